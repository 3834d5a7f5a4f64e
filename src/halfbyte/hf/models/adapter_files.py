"""A PEFT adapter folder put on its base model, or refused in a sentence that says what does not fit.

PEFT (0.21) loads what has a place in the model and says little of the rest: tensors under other names are left out, so
that the base model answers, and other sizes or layers end in a traceback. Here every tensor of the file finds its place
and every place its tensor. Names that a wrapper has changed are taken for what they were, with a warning. A file whose
embeddings have more rows than the base's (tokens were added before training) has the base's grow first.
"""

import contextlib
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import (
    MODEL_TYPE_TO_PEFT_MODEL_MAPPING,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PeftType,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.adalora import AdaLoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import TrainableTokensWrapper, load_peft_weights
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel

from halfbyte.errors import InputError
from halfbyte.hf.layers.adapters import check_kind
from halfbyte.hf.layers.expert_adapters import stack_misfits
from halfbyte.hf.layers.expert_targets import as_peft_reads, as_we_read, has_experts, own_words
from halfbyte.hf.layers.head import base_of
from halfbyte.hf.models.base_files import check_base
from halfbyte.nn import QuantizedLinear

FILES = ("adapter_model.safetensors", "adapter_model.bin")
PREFIX = "base_model.model."
WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module", "default")
"""What torch.compile, data parallelism and FSDP add to a name, and the adapter's own that PEFT leaves out of files."""
BESIDE = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "chat_template.jinja", "generation_config.json",
)  # fmt: skip
"""Files in an adapter's folder that are to be there wherever it goes: what texts become, and where answers end."""
SHOWN = 3


def put_adapter(
    model: PreTrainedModel | PeftModel, folder: Path, trained: bool = False, *, name: str | None = None
) -> PeftModel:
    """Put the adapter in ``folder`` on ``model``, to run, or to be ``trained`` further.

    Args:
        model: its base model; its embeddings grow or shrink to the rows that the adapter brings. It may be on the meta
            device, all of it: then the adapter's tensors alone are in memory.
        folder: what PEFT's ``save_pretrained`` or a run has left: any kind of adapter.
        trained: whether it is to be trained.
        name: of the adapter, on a model that others use too or that has adapters already: its embeddings stay as they
            are, and where the adapter does not fit, the model is left as it was.

    Raises:
        InputError: the folder holds no whole adapter, or one of another base model, or of a kind that needs dense
            weights.
    """
    check_base(folder, getattr(base_of(model), "opened_from", None))
    config, weights = _read(model, folder)
    config.inference_mode = not trained
    if config.peft_type == PeftType.ADALORA and is_on_meta(model):
        weights = _with_all_ranks(config, weights)
    if any(isinstance(module, QuantizedLinear) for module in model.modules()):
        check_kind(config.peft_type)
    _check_stacks(model, config, weights, folder)
    _resize(model, config, weights, folder, may=name is None)
    kind = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, PeftModel)
    words: Any = contextlib.nullcontext()
    if experts := has_experts(base_of(model)):
        as_we_read(config)
        words = own_words(model.peft_config.values() if isinstance(model, PeftModel) else ())
    try:
        with words:
            adapted = _made(kind, model, config, name or "default")
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        targets = getattr(config, "target_modules", None)
        if "not found in the base model" in str(error) and isinstance(targets, (set, list)):
            raise _misfit(
                model, folder, f"the base model has none of its layers, {_listed(sorted(targets))}"
            ) from error
        raise _misfit(model, folder, _sentence(error)) from error
    try:
        _load(model, adapted, config, weights, folder, name or "default")
    except BaseException:
        if name is not None:
            drop_adapter(adapted, name)
        raise
    if config.peft_type == PeftType.ADALORA and is_on_meta(model):
        for layer in adapted.modules():
            if isinstance(
                layer, AdaLoraLayer
            ):  # a parameter that PEFT (0.21) puts where the base is, and saves nowhere
                rank = torch.tensor([float(config.init_r)])
                layer.ranknum[name or "default"] = nn.Parameter(rank, requires_grad=False)
    if experts:
        as_peft_reads(config)
    return adapted if trained else adapted.eval()


def _made(kind: Any, model: PreTrainedModel | PeftModel, config: PeftConfig, name: str) -> PeftModel:
    """Return the model with an adapter of this configuration, without its values."""
    if isinstance(model, PeftModel):
        model.add_adapter(name, config)
        return model
    made: PeftModel = kind(model, config, adapter_name=name, low_cpu_mem_usage=is_on_meta(model))
    return made


def check_numbers(config: PeftConfig, folder: Path) -> None:
    """Check the numbers that LoRA's file of settings says: ranks, and what scales go by.

    Raises:
        InputError: one is none.
    """
    if not isinstance(config, LoraConfig):
        return
    for name, is_rank in (("r", True), ("lora_alpha", False)):
        patterns = getattr(config, {"r": "rank_pattern", "lora_alpha": "alpha_pattern"}[name], None)
        given = {name: getattr(config, name, None), **(patterns if isinstance(patterns, dict) else {})}
        for what, value in given.items():
            if value is None or isinstance(value, list):  # AdaLoRA's patterns say which ranks are left
                continue
            kind = int if is_rank else (int, float)
            if isinstance(value, bool) or not isinstance(value, kind) or not math.isfinite(value) or is_rank > value:
                wanted = "a whole number of 1 or more" if is_rank else "a finite number"
                raise InputError(f"{folder / 'adapter_config.json'} says {what} {value!r}; it must be {wanted}.")


def drop_adapter(model: PeftModel, name: str) -> PreTrainedModel | PeftModel:
    """Take an adapter off a model, and return the model: without PEFT's wrapper where it was the last one."""
    if set(model.peft_config) == {name} and not model.peft_config[name].is_prompt_learning:
        base: PreTrainedModel = model.unload()
        return base
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that another one is active now
        model.delete_adapter(name)
    return model


def _load(
    model: PreTrainedModel | PeftModel,
    adapted: PeftModel,
    config: PeftConfig,
    weights: dict[str, Tensor],
    folder: Path,
    name: str,
) -> None:
    """Load weights into an adapter that was made.

    Raises:
        InputError: one has no place, or a place no weight.
    """
    expected = get_peft_model_state_dict(adapted, adapter_name=name, save_embedding_layers=False)
    weights = _renamed(weights, expected, folder)
    if config.peft_type != PeftType.ADALORA:  # whose ranks follow from its configuration while it is loaded
        wrong = [name for name, x in expected.items() if name in weights and weights[name].shape != x.shape]
        shapes = [f"{name} is {_shape(weights[name])} and should be {_shape(expected[name])}" for name in wrong]
        if shapes:
            raise _misfit(model, folder, _listed(shapes, "; "))
    try:
        with _staying() if is_on_meta(model) else contextlib.nullcontext():
            result = set_peft_model_state_dict(adapted, weights, adapter_name=name, low_cpu_mem_usage=is_on_meta(model))
    except KeyError as error:
        raise _misfit(model, folder, f"the file lacks {error.args[0]}") from error
    except (RuntimeError, ValueError) as error:
        raise _misfit(model, folder, _sentence(error)) from error
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING.get(config.peft_type)
    missing = [key for key in result.missing_keys if prefix and prefix in key and f".{name}" in key]
    # what layers share is saved once, and prompts are not parameters of layers
    missing = [key for key in missing if key.replace(f".{name}", "") in expected]
    tied = [
        f"{name}.token_adapter.trainable_tokens_delta"
        for name, module in adapted.named_modules()
        if isinstance(module, TrainableTokensWrapper) and module.token_adapter.tied_adapter
    ]
    unexpected = [name for name in result.unexpected_keys if name not in tied and not config.is_prompt_learning]
    for names, words in ((unexpected, "has no place for"), (missing, "needs, and the file lacks,")):
        if names:
            raise _misfit(model, folder, f"the base model {words} {_listed(names)}")


def _check_stacks(
    model: PreTrainedModel | PeftModel, config: PeftConfig, weights: Mapping[str, Tensor], folder: Path
) -> None:
    """Hold the stacks of experts that an adapter is on to be the base's.

    Raises:
        InputError: they have another number of experts, or another width.
    """
    first, second = (f".lora_{letter}.weight" for letter in "AB")
    bare = {_bare(name): list(x.shape) for name, x in weights.items()}
    pairs = {
        name.removesuffix(first): (shape, bare[other])
        for name, shape in bare.items()
        if name.endswith(first) and (other := name.removesuffix(first) + second) in bare
    }
    if found := stack_misfits(base_of(model), folder, config, pairs):
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise _misfit(model, folder, found[0] + more)


def is_on_meta(model: PreTrainedModel | PeftModel) -> bool:
    """Whether the base model has no memory."""
    return next(base_of(model).parameters()).is_meta


@contextlib.contextmanager
def _staying() -> Iterator[None]:
    """Let adapters that are loaded stay in memory, which PEFT (0.21) moves to where their layers are."""
    kinds = (BaseTunerLayer, ParamWrapper)
    moving = [kind._move_adapter_to_device_of_base_layer for kind in kinds]
    for kind in kinds:
        kind._move_adapter_to_device_of_base_layer = lambda *_, **__: None
    try:
        yield
    finally:
        for kind, own in zip(kinds, moving, strict=True):
            kind._move_adapter_to_device_of_base_layer = own


def _read(model: PreTrainedModel | PeftModel, folder: Path) -> tuple[PeftConfig, dict[str, Tensor]]:
    if not any((folder / name).is_file() for name in FILES):
        raise InputError(f"The adapter {folder} holds no {FILES[0]}; copy it there, or save the adapter again.")
    try:
        config = PeftConfig.from_pretrained(str(folder))
        mapping = {} if config.is_prompt_learning else getattr(base_of(model), "_checkpoint_conversion_mapping", {})
        weights = load_peft_weights(str(folder), device="cpu", key_mapping=mapping)
    except (ValueError, TypeError, KeyError, OSError, SafetensorError) as error:
        raise InputError(f"The adapter {folder} cannot be read: {_sentence(error)}.") from error
    if config.peft_type is None:
        raise InputError(
            f"{folder / 'adapter_config.json'} names no kind of adapter (peft_type): it is not a PEFT adapter."
        )
    check_numbers(config, folder)
    # PEFT saves an embedding that was resized and is trained as a whole twice
    twice = [name for name in weights if name.replace(".modules_to_save.", ".") in weights.keys() - {name}]
    return config, {name: tensor for name, tensor in weights.items() if name not in twice}


def _with_all_ranks(config: PeftConfig, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return AdaLoRA's ``P (in B), Λ (in E), Q (in A)`` with zeros for what was pruned, and let ``config`` forget it.

    PEFT (0.21) prunes its layers while it loads, by copying values that layers on the meta device do not have.
    """
    pruned, config.rank_pattern = config.rank_pattern or {}, None
    whole = dict(weights)
    for name, kept in pruned.items():
        layer = PREFIX + name.partition(".lora_E")[0]
        places = torch.tensor(kept).nonzero().flatten()
        for letter, dim in (("A", 0), ("B", 1), ("E", 0)):
            x = weights.get(f"{layer}.lora_{letter}")
            if x is not None and x.shape[dim] == len(places):
                shape = [*x.shape[:dim], len(kept), *x.shape[dim + 1 :]]
                whole[f"{layer}.lora_{letter}"] = x.new_zeros(shape).index_copy(dim, places, x)
    return whole


def _resize(
    model: PreTrainedModel | PeftModel, config: PeftConfig, weights: Mapping[str, Tensor], folder: Path, may: bool
) -> None:
    """Give the embeddings of ``model`` as many rows as the adapter brings, whole or one by one."""
    heads = [model.get_input_embeddings(), model.get_output_embeddings()]
    names = {name for name, module in base_of(model).named_modules() if any(module is head for head in heads)}
    found = {weights[key].shape[0] for key in _embedding_keys(names) if key in weights}
    rows = model.get_input_embeddings().weight.shape[0]
    single = getattr(config, "trainable_token_indices", None) or []
    lists = [*single.values()] if isinstance(single, dict) else [single]
    last = max((row for rows_of_one in lists for row in rows_of_one), default=-1)
    if not found and last >= rows:
        found = {last + 1}
    if found <= {rows}:
        return
    if len(found) > 1 or not may or isinstance(heads[1], QuantizedLinear):
        raise _misfit(
            model, folder, f"its embeddings have {' and '.join(map(str, sorted(found)))} rows, the base's {rows}"
        )
    model.resize_token_embeddings(found.pop(), mean_resizing=False)


def _embedding_keys(names: Iterable[str]) -> list[str]:
    parts = ("weight", "base_layer.weight", "token_adapter.base_layer.weight")
    return [f"{PREFIX}{name}.{part}" for name in names for part in parts]


def _renamed(weights: Mapping[str, Tensor], expected: Iterable[str], folder: Path) -> dict[str, Tensor]:
    """Return ``weights`` under the names that are expected, where only a wrapper's additions tell them apart."""
    places: dict[str, list[str]] = {}
    for name in expected:
        places.setdefault(_bare(name), []).append(name)
    known = {name for names in places.values() for name in names}
    renamed: dict[str, str] = {}
    for name in weights:
        own = places.get(_bare(name), [])
        if name not in known and len(own) == 1 and own[0] not in weights:
            renamed[name] = own[0]
    if len(set(renamed.values())) < len(renamed):
        return dict(weights)
    if renamed:
        first, place = next(iter(renamed.items()))
        warnings.warn(
            f"{len(renamed)} tensors of the adapter {folder} have names that a wrapper has changed, such as {first}; "
            f"they were taken for {place} and so on.",
            stacklevel=2,
        )
    return {renamed.get(name, name): tensor for name, tensor in weights.items()}


def _bare(name: str) -> str:
    name = ".".join(part for part in name.split(".") if part not in WRAPPERS)
    while name.startswith(PREFIX):
        name = name.removeprefix(PREFIX)
    return name


def _misfit(model: PreTrainedModel | PeftModel, folder: Path, what: str) -> InputError:
    base = model.config._name_or_path or type(model).__name__
    return InputError(
        f"The adapter {folder} does not fit the base model {base}: {what}. Name the model that it was trained on in "
        "its adapter_config.json (base_model_name_or_path)."
    )


def _sentence(error: Exception) -> str:
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    return text.strip().split("\n")[0].split(". ")[0].rstrip(".:")


def _shape(tensor: Any) -> str:
    return str(list(tensor.shape))


def _listed(items: list[str], separator: str = ", ") -> str:
    more = f" and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return separator.join(items[:SHOWN]) + more
