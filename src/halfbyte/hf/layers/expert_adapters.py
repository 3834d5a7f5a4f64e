"""LoRA on experts: PEFT's (0.21) way of naming and saving it, our way of computing it.

PEFT adapts a stack of experts by its name (``target_parameters``): of all experts together it holds ``A [E·r, in]``, an
expert's rows together, and ``B [out, r·E]``, an expert's columns E apart, and computes with ``W + BA`` of all experts.
Here only the rows of an expert pass its A and B, after dropout, which PEFT refuses there; files are PEFT's.

PEFT reads ``gate_proj``, ``up_proj``, ``down_proj`` and ``gate`` among a mixture's ``target_modules`` as experts and
router, since they were layers once, and so cannot name an ordinary layer that is called so (a shared expert's). Files
name such layers by their parameter (``shared_expert.gate_proj.weight``), of which PEFT makes the same, by the same
names.
"""

import contextlib
from collections.abc import Container, Iterable, Iterator, Sequence
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.tuners.tuners_utils import _find_minimal_target_modules
from peft.utils import transformers_weight_conversion
from torch import Tensor, nn

from halfbyte.errors import InputError, named
from halfbyte.hf.layers.adapters import refuse_merge
from halfbyte.hf.layers.experts import Adapters, Experts
from halfbyte.nn.experts import StackedLowRank

READ_AS_EXPERTS = frozenset(
    name for names in transformers_weight_conversion._MOE_TARGET_MODULE_MAPPING.values() for name in names
)
WEIGHT = ".weight"


class LoraExperts(ParamWrapper):
    """PEFT's wrapper of a stack of experts, with our forward; wrappers of several stacks hold each other."""

    def forward(self, x: Tensor, *args: Any, adapters: Adapters | None = None, **kwargs: Any) -> Tensor:
        """What :meth:`Experts.forward` returns, with the adapters that are active here too."""
        found = dict(adapters or {})
        names = [] if self.disable_adapters else [name for name in self.active_adapters if name in self.lora_A]
        if names:
            dropouts = {self._dropout(name) for name in names}
            if len(dropouts) > 1:
                raise InputError(f"The adapters {named(names)} of experts have another dropout each; activate one.")
            found[self.parameter_name] = ([low_rank(self, name) for name in names], dropouts.pop())
        y: Tensor = self.base_layer(x, *args, adapters=found, **kwargs)
        return y

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse, as other layers over 4-bit weights do."""
        refuse_merge()

    def _dropout(self, name: str) -> float:
        dropout = self.lora_dropout[name]
        return float(dropout.p) if isinstance(dropout, nn.Dropout) and dropout.training else 0.0


def low_rank(wrapper: Any, name: str) -> StackedLowRank:
    """Return the adapter ``name`` of PEFT's wrapper of a stack, expert by expert; its tensors are views."""
    a, b = wrapper.lora_A[name].weight, wrapper.lora_B[name].weight
    experts = wrapper.num_experts
    a, bt = a.view(experts, -1, a.shape[1]), b.view(b.shape[0], -1, experts).permute(2, 1, 0)
    return StackedLowRank(*((bt, a) if wrapper.get_base_layer().swapped else (a, bt)), wrapper.scaling[name])


def merged_weight(wrapper: Any, expert: int, layer: str, weight: Tensor, names: Sequence[str] | None = None) -> Tensor:
    """Return a matrix of an expert with its adapters in it, fp32 ``[out, in]``.

    Args:
        wrapper: PEFT's outermost wrapper of a stack, which holds those of other stacks.
        expert: its number.
        layer: the name of its layer.
        weight: the matrix without adapters, fp32.
        names: of the adapters; None takes the active ones.
    """
    layers_of = wrapper.get_base_layer().layers_of
    while isinstance(wrapper, ParamWrapper):
        layers = layers_of[wrapper.parameter_name]
        if layer in layers:
            first = layers.index(layer) * len(weight)
            for name in names or wrapper.active_adapters:
                if name in wrapper.lora_A:
                    part = low_rank(wrapper, name)
                    rows = part.bt[expert, :, first : first + len(weight)].T.float()
                    weight = torch.addmm(weight, rows, part.a[expert].float(), alpha=part.scaling)
        wrapper = wrapper.base_layer
    return weight.detach()


def merged_experts(wrapper: LoraExperts, dtype: torch.dtype, names: Sequence[str] | None = None) -> Experts:
    """Return the experts below a wrapper with dense layers, each the sum of what it stands for and its adapters'.

    Args:
        wrapper: the outermost.
        dtype: of the dense layers where the experts' have no compute dtype.
        names: of the adapters; None takes the active ones.
    """
    experts: Experts = ParamWrapper.get_base_layer(wrapper)
    for number in range(experts.num_experts):
        for layer in [layer for layers in experts.layers_of.values() for layer in layers]:
            frozen: Any = experts.get_submodule(f"{number}.{layer}")
            weight = merged_weight(wrapper, number, layer, frozen.dequantize(torch.float32), names)
            dense = nn.Linear(frozen.in_features, frozen.out_features, bias=False, device="meta")
            dense.weight = nn.Parameter(weight.to(frozen.compute_dtype or dtype), requires_grad=False)
            dense.bias = frozen.bias
            experts.get_submodule(str(number)).add_module(layer, dense)
    return experts


def has_experts(model: nn.Module) -> bool:
    """Whether a model has experts that were taken apart."""
    return any(isinstance(module, Experts) for module in model.modules())


def target_experts(model: nn.Module, config: LoraConfig, layers: Iterable[str], *, plain: bool) -> None:
    """Make what a configuration says of experts' layers PEFT's words, in place.

    Args:
        model: the base model.
        config: whose ``target_modules`` become layers outside experts, ``target_parameters`` stacks.
        layers: paths of all linear layers that it was to go on.
        plain: whether the adapter begins as the paper's does.

    Raises:
        InputError: it names one of gate and up alone, which are one stack; or DoRA, or a beginning of their own.
    """
    paths = {*layers}
    stacks: list[str] = []
    inside: set[str] = set()
    for path, experts in model.named_modules():
        if not isinstance(experts, Experts):
            continue
        inside |= {name for name in paths if name.startswith(f"{path}.")}
        for stack, parts in experts.layers_of.items():
            if is_adapted(path, parts, paths):
                stacks.append(f"{path}.{stack}")
    if not stacks:
        return
    check_plain(bool(config.use_dora), plain)
    everywhere = [path for path, module in model.named_modules() if isinstance(module, Experts)]
    short = {f"experts.{name.rpartition('.')[2]}" for name in stacks}
    whole = len(stacks) == len(everywhere) * len(short) and all(path.endswith(".experts") for path in everywhere)
    outside = paths - inside
    others = [name for name, _ in model.named_modules() if name and name not in outside]
    config.target_modules = {*_find_minimal_target_modules([*outside], others)} if outside else set()
    config.target_parameters = sorted(short if whole else stacks) or None
    config.exclude_modules = config.layers_to_transform = None  # what they say is in the names now
    config.lora_dropout = 0.0  # PEFT refuses another; see set_dropout


def is_adapted(path: str, parts: Sequence[str], layers: Container[str]) -> bool:
    """Return whether an adapter goes on a stack, as it does where it was to go on the layers of the first expert.

    Args:
        path: of the experts.
        parts: the layers of an expert that are one stack.
        layers: paths of all linear layers that the adapter was to go on.

    Raises:
        InputError: it was to go on some of them alone.
    """
    taken = [part for part in parts if f"{path}.0.{part}" in layers]
    if taken and len(taken) < len(parts):
        raise InputError(
            f"target_modules takes {taken[0]} of {path} without {named([p for p in parts if p not in taken])}: "
            "an expert's gate and up have one adapter together, so name both or neither."
        )
    return bool(taken)


def check_plain(use_dora: bool, plain: bool) -> None:
    """Refuse what adapters of experts cannot be.

    Args:
        use_dora: whether they would have magnitudes.
        plain: whether they begin as the paper's do.

    Raises:
        InputError: they are no plain LoRA.
    """
    if use_dora:
        raise InputError("use_dora does not go with experts, which take plain LoRA; leave it out, or the experts.")
    if not plain:
        raise InputError("Experts' adapters begin with zeros alone; leave init_lora_weights out, or the experts.")


@contextlib.contextmanager
def own_words() -> Iterator[None]:
    """Have PEFT take configurations as they are meanwhile."""
    converting = transformers_weight_conversion.convert_peft_config_for_transformers
    transformers_weight_conversion.convert_peft_config_for_transformers = lambda *_, **__: None
    try:
        yield
    finally:
        transformers_weight_conversion.convert_peft_config_for_transformers = converting


def set_dropout(model: nn.Module, name: str, dropout: float) -> None:
    """Give the adapter ``name`` a dropout, on experts too, for which PEFT's configuration cannot have one."""
    for module in model.modules():
        if isinstance(module, LoraLayer) and name in module.lora_dropout:
            module.lora_dropout[name] = nn.Dropout(dropout) if dropout else nn.Identity()


def as_peft_reads(config: LoraConfig) -> None:
    """Make a configuration of an adapter of a mixture what PEFT opens over transformers' own, in place; see above."""
    modules = config.target_modules
    read_otherwise = {name for name in modules or () if name.rpartition(".")[2] in READ_AS_EXPERTS}
    if read_otherwise and not isinstance(modules, str):
        config.target_modules = {*modules} - read_otherwise
        named_so = {name + WEIGHT for name in read_otherwise}
        config.target_parameters = sorted({*(config.target_parameters or ()), *named_so})


def as_we_read(config: Any) -> None:
    """Undo :func:`as_peft_reads`, in place."""
    parameters = getattr(config, "target_parameters", None) or []
    layers = {name.removesuffix(WEIGHT) for name in parameters if name.endswith(WEIGHT)}
    if layers:
        config.target_modules = {*(config.target_modules or ()), *layers}
        config.target_parameters = sorted(name for name in parameters if not name.endswith(WEIGHT)) or None
