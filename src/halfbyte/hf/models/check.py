"""Whether a checkpoint's tensors are those of the model: looked at before any is read, by transformers' own rules.

transformers (5.23) fills what a checkpoint lacks with random values, leaves out what the model has no place for, and
logs a table. Here both are errors that name the tensors. Its loader is run on the meta device, with the tensors' forms
alone, so that renamings, merged experts, split projections, tied weights and what a class declares ignorable all count
as they will count in earnest. Allowed, and said:

    new      the head of a task that the checkpoint was not made for, and a pooler: to be trained
    unused   a part that the model does not have at all: a head of another task, old buffers (these without a word)

and a value that is not finite is an error too, where weights are quantized and where dense ones come to memory.
"""

import copy
import logging
import math
import re
from collections.abc import Container, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.pytorch_utils import Conv1D
from transformers.utils.logging import EmptyTqdm, set_tqdm_hook

from halfbyte.errors import InputError
from halfbyte.hf.layers.stacks import conversions
from halfbyte.hf.models.checkpoint import INDEX, Tensors, read_index

logger = logging.getLogger(__name__)

SHOWN = 6
"""So many names are told; of the rest how many they are."""

# Buffers that older releases saved: masks and angles, which the model makes itself.
OLD_BUFFERS = re.compile(r"(^|\.)((rotary_emb\.)?inv_freq|masked_bias|causal_mask|position_ids|token_type_ids)$")

# What else a file holds of one quantized weight.
_PARTS = re.compile(r"\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.(bitsandbytes|halfbyte)__\w+)$")

_ROWS = (".SCB", ".weight_format")


class Names:
    """What a tensor of a checkpoint is called in the model, by transformers' (5.23) own rules."""

    def __init__(self, model: PreTrainedModel) -> None:
        transforms = conversions(get_model_conversion_mapping(model), model)
        self.renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
        self.converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
        self.prefix = model.base_model_prefix
        self.meta = model.state_dict()

    def of(self, name: str) -> tuple[str, str | None]:
        """Return the name in the model, and the pattern of the converter that the tensor goes through, if any."""
        renamed: tuple[str, str | None] = rename_source_key(
            name, self.renamings, self.converters, self.prefix, self.meta
        )
        return renamed


@dataclass(frozen=True)
class Fit:
    """What of a model is not in its checkpoint, though the two fit.

    Attributes:
        new: tensors that the checkpoint lacks, to be trained.
        resized: tensors of another shape outside the base model, with both shapes: a head for other classes, which
            transformers makes anew where ``ignore_mismatched_sizes`` asks for it, and refuses else.
    """

    new: list[str]
    resized: list[str]


def check_weights(model: PreTrainedModel, checkpoint: Tensors, pre_quantized: bool, head_follows: bool = False) -> Fit:
    """Check that ``checkpoint`` holds the weights of ``model``.

    Args:
        model: on the meta device, as its class makes it, all layers dense.
        checkpoint: its.
        pre_quantized: whether the configuration says that the checkpoint is quantized.
        head_follows: whether an adapter brings what is new, so that nothing is said of it.

    Raises:
        InputError: tensors are missing, have no place, or have another shape, and it names them; or the checkpoint is
            quantized where it should not be, or the other way round.
    """
    packed = checkpoint.quantized
    if not packed and any(name.endswith(".qweight") for name in checkpoint.names):
        raise InputError(
            f"The weights in {checkpoint.where} are packed (qweight), but config.json has no quantization_config that "
            "says how, and there is no quantize_config.json: copy them from the model's source again."
        )
    if bool(packed) != pre_quantized:
        held, said = (f"in {_bits(packed, checkpoint)} bits", "no") if packed else ("dense", "a")
        raise InputError(
            f"The weights in {checkpoint.where} are {held}, but config.json has {said} quantization_config: copy both "
            "from the model's source again."
        )
    forms = {name: checkpoint.form(name) for name in checkpoint.names if not part_of(name, packed)}
    forms |= {name: torch.empty(shape, dtype=torch.bfloat16, device="meta") for name, shape in packed.items()}
    found = _tried(model, forms)
    sought = type(model).__name__ in (model.config.architectures or [type(model).__name__])
    head = {id(module) for module in _outside(model)}
    missing: list[str] = []
    new: list[str] = []
    for name in sorted(found.missing_keys):
        is_new = not sought and _is_new(model, name, found.missing_keys, head)
        (new if is_new else missing).append(name)
    misplaced: list[str] = []
    unused: list[str] = []
    for name in sorted(found.unexpected_keys):
        if not OLD_BUFFERS.search(name) and not _is_mask(forms.get(name)):
            (misplaced if _is_within(model, name) else unused).append(name)
    shapes: list[str] = []
    resized: list[str] = []
    transposed = {name for name, module in model.named_modules() if isinstance(module, Conv1D)}
    for name, held, wanted in sorted(found.mismatched_keys):
        if packed and name.removesuffix(".weight") in transposed and tuple(held) == tuple(reversed(wanted)):
            continue
        in_head = id(model.get_submodule(name.rpartition(".")[0])) in head
        (resized if in_head else shapes).append(f"{name} is {_shape(held)}, in the model {_shape(wanted)}")
    broken = [
        f"{name} ({reason})"
        for name, text in sorted(found.conversion_errors.items())
        if "meta" not in (reason := _reason(text))
    ]
    _refuse(
        checkpoint,
        type(model).__name__,
        [
            ("missing", missing, _home_of(missing, checkpoint)),
            ("without a place in the model", misplaced, ""),
            ("of another shape", shapes, ""),
            ("not to be put together from the checkpoint's", broken, ""),
        ],
    )
    if new and not head_follows:
        logger.warning(
            "%s is new: the checkpoint has none, so its values are random until it is trained (%s).",
            type(model).__name__, _listed(new),
        )  # fmt: skip
    if unused:
        logger.warning("%s has no use for part of the checkpoint (%s).", type(model).__name__, _listed(unused))
    return Fit(new, resized)


def check_finite(name: str, tensor: Tensor) -> None:
    """Check that no value of ``tensor`` is NaN or infinite; one pass over it.

    Raises:
        InputError: one is; the sentence has the tensor's name and the first such value's index.
    """
    if tensor.numel() == 0 or not tensor.is_floating_point() or tensor.element_size() < 2:
        return
    low, high = tensor.aminmax()  # NaN wins
    if math.isfinite(float(low)) and math.isfinite(float(high)):
        return
    index = (~tensor.isfinite()).nonzero()[0].tolist()
    value = float(tensor[tuple(index)])
    raise InputError(
        f"{name} holds {value} at {index} (as {str(tensor.dtype).removeprefix('torch.')}): the model is damaged, or "
        "its values are too large for that type; take an undamaged copy, or another compute dtype."
    )


def _tried(model: PreTrainedModel, forms: dict[str, Tensor]) -> Any:
    """Return what transformers (5.23) finds when it loads tensors of these ``forms`` into a copy of ``model``."""
    trial = copy.deepcopy(model)
    config = LoadStateDictConfig(
        device_map={"": "meta"},
        dtype=torch.bfloat16,
        weight_mapping=conversions(get_model_conversion_mapping(trial), trial),
    )
    hook = set_tqdm_hook(lambda _, args, kwargs: EmptyTqdm(*args, **kwargs))
    try:
        found, _ = convert_and_load_state_dict_in_model(trial, forms, config)
    finally:
        set_tqdm_hook(hook)
    # Of weights that are one, one has to be there. (tie_weights, which knows it too, is off while a model is built.)
    for source in set(trial.all_tied_weights_keys.values()):
        same = {source, *(target for target, of in trial.all_tied_weights_keys.items() if of == source)}
        if not same <= found.missing_keys:
            found.missing_keys -= same
    trial._adjust_missing_and_unexpected_keys(found)
    return found


def _outside(model: PreTrainedModel) -> list[nn.Module]:
    """Return the modules that are neither in the base model nor the output embeddings: heads of tasks."""
    output = model.get_output_embeddings()
    inside = {id(module) for part in (model.base_model, output) if part is not None for module in part.modules()}
    return [module for module in model.modules() if id(module) not in inside]


def _is_new(model: PreTrainedModel, name: str, missing: set[str], head: set[int]) -> bool:
    module, _, _ = name.rpartition(".")
    base = next((prefix for prefix, part in model.named_modules() if part is model.base_model), "")
    pooler = f"{base}.pooler".lstrip(".")
    if name.startswith(f"{pooler}."):
        own = {f"{pooler}.{key}" for key in model.get_submodule(pooler).state_dict()}
        return own <= missing
    return id(model.get_submodule(module)) in head


def _is_within(model: PreTrainedModel, name: str) -> bool:
    """Whether the tensor ``name`` would be in a module that the model has, below the base model."""
    parts = name.split(".")
    modules = dict(model.named_modules())
    deepest = next(prefix for i in range(len(parts), -1, -1) if (prefix := ".".join(parts[:i])) in modules)
    module = modules[deepest]
    return module is not model and any(module is part for part in list(model.base_model.modules())[1:])


def part_of(name: str, packed: Container[str]) -> str | None:
    """Return which weight in 4 or 8 bits, of those ``packed``, a tensor belongs to beside its codes; None: to none."""
    if name.endswith(_ROWS):
        weight = f"{name.rpartition('.')[0]}.weight"
    elif found := _PARTS.search(name):
        weight = name[: found.start()]
    else:
        return None
    return weight if weight in packed else None


def _bits(packed: dict[str, torch.Size], checkpoint: Tensors) -> int:
    return 8 if all(checkpoint.form(name).shape == shape for name, shape in packed.items()) else 4


def _is_mask(form: Tensor | None) -> bool:
    """Whether a tensor is one of bits or indices, or a causal mask saved as floats."""
    if form is None:
        return False
    return not form.is_floating_point() or (form.ndim == 4 and form.shape[:2] == (1, 1))


def _home_of(missing: list[str], checkpoint: Tensors) -> str:
    """Say so where an index names a file for a missing tensor, which does not hold it."""
    for index in {path for file in checkpoint.files for path in file.parent.glob(f"*{INDEX}")}:
        homes = read_index(index)
        for name in missing:
            if name in homes:
                return f"; {index.name} says that {name} is in {homes[name]}"
    return ""


def _refuse(checkpoint: Tensors, model: str, kinds: list[tuple[str, list[str], str]]) -> None:
    told = [
        f"{len(names)} tensor{'s are' if len(names) > 1 else ' is'} {kind} ({_listed(names)}{more})"
        for kind, names, more in kinds
        if names
    ]
    if not told:
        return
    raise InputError(
        f"{checkpoint.where} and config.json do not fit each other ({model}): {'; '.join(told)}. Copy both from the "
        "model's source again."
    )


def _listed(names: list[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f", and {more} more" if more > 0 else "")


def _shape(shape: Iterable[int]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _reason(text: str) -> str:
    """Return the last sentence of an error of transformers' conversion, which holds a traceback too."""
    lines = text.split("\nError")[0].strip().splitlines()
    return lines[-1].strip() if lines else text
