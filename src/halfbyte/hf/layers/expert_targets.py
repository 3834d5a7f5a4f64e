"""What configurations of adapters say of a mixture: in our words, which are layers' names, and in PEFT's (0.21).

PEFT reads ``gate_proj``, ``up_proj``, ``down_proj`` and ``gate`` among a mixture's ``target_modules`` as experts and
router, since they were layers once, and so cannot name an ordinary layer that is called so (a shared expert's). Files
name such layers by their parameter (``shared_expert.gate_proj.weight``), of which PEFT makes the same, by the same
names.
"""

import contextlib
import warnings
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from typing import Any

from peft import LoraConfig
from peft.tuners.tuners_utils import _find_minimal_target_modules
from peft.utils import transformers_weight_conversion
from torch import nn

from halfbyte.errors import InputError, named
from halfbyte.hf.layers.experts import Experts

READ_AS_EXPERTS = frozenset(
    name for names in transformers_weight_conversion._MOE_TARGET_MODULE_MAPPING.values() for name in names
)
WEIGHT = ".weight"
BY_WEIGHT = "(?:", r")(\.weight)?"
"""What is around a pattern that is to match a layer that is named by its parameter, too."""


def has_experts(model: nn.Module) -> bool:
    """Whether a model has experts that were taken apart."""
    return any(isinstance(module, Experts) for module in model.modules())


def stacks_by_layer(model: nn.Module) -> dict[str, str]:
    """Return by the path of each expert's layers the name of its stack, which PEFT's patterns are matched with."""
    return {
        f"{path}.{number}.{layer}": f"{path}.{stack}"
        for path, experts in model.named_modules()
        if isinstance(experts, Experts)
        for stack, layers in experts.layers_of.items()
        for layer in layers
        for number in range(experts.num_experts)
    }


def target_experts(model: nn.Module, config: LoraConfig, layers: Iterable[str], *, plain: bool) -> None:
    """Make what a configuration says of experts' layers PEFT's words, in place.

    Args:
        model: the base model.
        config: whose ``target_modules`` become layers outside experts, ``target_parameters`` stacks.
        layers: paths of all linear layers that it was to go on.
        plain: whether the adapter begins as the paper's does.

    Raises:
        InputError: it names one of gate and up alone, which are one stack; or DoRA, or a beginning of their own; or
            all biases, and the experts have some.
    """
    paths = {*layers}
    if not paths:
        return
    stacks: list[str] = []
    inside: set[str] = set()
    for path, experts in model.named_modules():
        if not isinstance(experts, Experts):
            continue
        inside |= {name for name in paths if name.startswith(f"{path}.")}
        if config.bias == "all" and experts.has_bias:
            raise InputError("bias all does not go with biases of experts, which stay frozen; take lora_only.")
        for stack, parts in experts.layers_of.items():
            if is_adapted(path, parts, paths):
                stacks.append(f"{path}.{stack}")
    if stacks:
        check_plain(bool(config.use_dora), plain)
        config.lora_dropout = 0.0  # PEFT refuses another; see set_dropout
    everywhere = [path for path, module in model.named_modules() if isinstance(module, Experts)]
    short = {f"experts.{name.rpartition('.')[2]}" for name in stacks}
    whole = len(stacks) == len(everywhere) * len(short) and all(path.endswith(".experts") for path in everywhere)
    outside = paths - inside
    others = [name for name, _ in model.named_modules() if name and name not in outside]
    config.target_modules = {*_find_minimal_target_modules([*outside], others)} if outside else set()
    config.target_parameters = sorted(short if whole else stacks) or None
    config.exclude_modules = config.layers_to_transform = None  # what they say is in the names now


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
def own_words(others: Iterable[LoraConfig] = ()) -> Iterator[None]:
    """Have PEFT take configurations as they are meanwhile, and not say of patterns for stacks that nothing matches.

    Args:
        others: of adapters that the model has by now, in PEFT's words; meanwhile they are in ours.
    """
    others = [*others]
    for config in others:
        as_we_read(config)
    converting = transformers_weight_conversion.convert_peft_config_for_transformers
    transformers_weight_conversion.convert_peft_config_for_transformers = lambda *_, **__: None
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"The following (rank|alpha)_pattern keys did not match", RuntimeWarning)
            yield
    finally:
        transformers_weight_conversion.convert_peft_config_for_transformers = converting
        for config in others:
            as_peft_reads(config)


def with_weight(pattern: str) -> str:
    """Return a pattern of ranks or alphas that matches a layer by its parameter too."""
    return pattern.join(BY_WEIGHT)


def _without_weight(pattern: str) -> str:
    bare = pattern.removeprefix(BY_WEIGHT[0]).removesuffix(BY_WEIGHT[1])
    return bare if pattern == with_weight(bare) else pattern


def _repattern(config: Any, change: Callable[[str], str]) -> None:
    for name in ("rank_pattern", "alpha_pattern"):
        patterns = getattr(config, name, None) or {}
        setattr(config, name, {change(key): value for key, value in patterns.items()})


def as_peft_reads(config: LoraConfig) -> None:
    """Make a configuration of an adapter of a mixture what PEFT opens over transformers' own, in place; see above."""
    modules = config.target_modules
    read_otherwise = {name for name in modules or () if name.rpartition(".")[2] in READ_AS_EXPERTS}
    if read_otherwise and not isinstance(modules, str):
        config.target_modules = {*modules} - read_otherwise
        named_so = {name + WEIGHT for name in read_otherwise}
        config.target_parameters = sorted({*(config.target_parameters or ()), *named_so})
        _repattern(config, with_weight)


def as_we_read(config: Any) -> None:
    """Undo :func:`as_peft_reads`, in place."""
    parameters = getattr(config, "target_parameters", None) or []
    layers = {name.removesuffix(WEIGHT) for name in parameters if name.endswith(WEIGHT)}
    if layers:
        config.target_modules = {*(config.target_modules or ()), *layers}
        config.target_parameters = sorted(name for name in parameters if not name.endswith(WEIGHT)) or None
        _repattern(config, _without_weight)
