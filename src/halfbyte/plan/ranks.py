"""The rank of LoRA on each linear layer, by a run's options, without a model: what PEFT (0.21) would put there."""

import re
from collections.abc import Mapping, Sequence

from peft.utils.other import get_pattern_key

from halfbyte.errors import InputError, nearest
from halfbyte.hf.layers.expert_targets import WEIGHT, check_plain, is_adapted
from halfbyte.hf.layers.lora_config import check_expressions, check_pattern
from halfbyte.hf.models.configs import ADAPTER, json_of
from halfbyte.plan.shape import Linear, Shape
from halfbyte.runs.config import TrainConfig

ALL = "all-linear"


def ranks_of(config: TrainConfig, shape: Shape) -> list[dict[str, int]]:
    """Return of each layer the rank on each of its linears, by their paths within the layer.

    Raises:
        InputError: the options match no layer, or say of experts what these do not take.
    """
    rank, pattern = config.rank, config.rank_pattern or {}
    targets: str | Sequence[str] = config.target_modules
    parameters: Sequence[str] = ()
    if config.adapter and (config.adapter / ADAPTER).is_file():
        own = json_of(config.adapter / ADAPTER)
        rank, targets, pattern = int(own["r"]), own["target_modules"] or (), own.get("rank_pattern") or {}
        parameters = own.get("target_parameters") or ()
    check_expressions("rank_pattern", pattern)
    exclude: Sequence[str] = config.exclude_modules or ()
    chosen: list[dict[str, int]] = []
    for index, layer in enumerate(shape.layers):
        among = config.layers_to_transform is None or index in config.layers_to_transform
        found = {}
        for linear in layer.linears:
            path = f"{shape.prefix}.{index}.{linear.path}"
            by_parameter = _named(path if linear.parts else path + WEIGHT, parameters)
            if among and (by_parameter or _takes(linear, path, targets, exclude)):
                found[linear.path] = int(pattern.get(get_pattern_key(pattern.keys(), path), rank))
        chosen.append(found)
    if not any(chosen):
        linears = [linear for layer in shape.layers for linear in layer.linears]
        names = list(dict.fromkeys(name for linear in linears for name in linear.parts or (linear.name,)))
        hint = nearest(targets, [*names, ALL]) if isinstance(targets, str) else ""
        raise InputError(
            f"target_modules {targets!r} matches no layer of the model{hint}, which has {', '.join(names)}."
        )
    both = zip(shape.layers, chosen, strict=True)
    on_experts = any(linear.path in one for layer, one in both for linear in layer.experts)
    if not config.adapter:
        check_pattern(
            "rank_pattern", pattern, [f"{shape.prefix}.{i}.{path}" for i, one in enumerate(chosen) for path in one]
        )
    if on_experts and not config.adapter:
        check_plain(config.use_dora, config.init_lora_weights == "default")
    return chosen


def adapter_parameters(shape: Shape, ranks: Sequence[Mapping[str, int]]) -> int:
    """Return the values of all A ``[rank, in]`` and B ``[out, rank]``; experts have their own each."""
    return sum(rank * x.count * (x.inputs + x.outputs) for x, rank in adapted(shape, ranks))


def active_adapter(shape: Shape, ranks: Sequence[Mapping[str, int]]) -> int:
    """Return how many of them are at work for a token."""
    return sum(rank * x.values for x, rank in adapted(shape, ranks))


def adapted(shape: Shape, ranks: Sequence[Mapping[str, int]]) -> list[tuple[Linear, int]]:
    """Return the linears of all layers that have an adapter, each with its rank."""
    both = zip(shape.layers, ranks, strict=True)
    return [(linear, one[linear.path]) for layer, one in both for linear in layer.linears if one.get(linear.path)]


def adapter_tensors(ranks: Sequence[dict[str, int]]) -> int:
    """Return how many matrices an adapter has."""
    return 2 * sum(len(layer) for layer in ranks)


def _takes(linear: Linear, path: str, targets: str | Sequence[str], exclude: Sequence[str]) -> bool:
    """Whether an adapter goes on a linear layer, on experts as :func:`target_experts` of a loaded model decides."""
    experts = path.rpartition(".")[0]
    layers = [f"{experts}.0.{part}" for part in linear.parts] or [path]
    taken = {each for each in layers if _matches(each, targets) and not (exclude and _matches(each, exclude))}
    return is_adapted(experts, linear.parts, taken) if linear.parts else bool(taken)


def _matches(path: str, targets: str | Sequence[str]) -> bool:
    if targets == ALL or list(targets) == [ALL]:
        return True
    if isinstance(targets, str):
        names = [name.strip() for name in targets.split(",")]
        if all(re.fullmatch(r"[\w.\-]+", name) for name in names) and _named(path, names):
            return True
        try:
            return re.fullmatch(targets, path) is not None
        except re.error as error:
            raise InputError(f"target_modules {targets!r} is no regular expression ({error}).") from error
    return _named(path, targets)


def _named(path: str, names: Sequence[str]) -> bool:
    return any(path == name or path.endswith(f".{name}") for name in names)
