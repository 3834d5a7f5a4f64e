"""The rank of LoRA on each linear layer, by a run's options, without a model: what PEFT (0.21) would put there."""

import re
from collections.abc import Sequence

from peft.utils.other import get_pattern_key

from halfbyte.errors import InputError, nearest
from halfbyte.hf.layers.lora_config import check_expressions
from halfbyte.hf.models.configs import ADAPTER, json_of
from halfbyte.plan.shape import Shape
from halfbyte.runs.config import TrainConfig

ALL = "all-linear"


def ranks_of(config: TrainConfig, shape: Shape) -> list[dict[str, int]]:
    """Return of each layer the rank on each of its linears, by their paths within the layer.

    Raises:
        InputError: the options match no layer.
    """
    rank, targets, pattern = config.rank, config.target_modules, config.rank_pattern or {}
    if config.adapter and (config.adapter / ADAPTER).is_file():
        own = json_of(config.adapter / ADAPTER)
        rank, targets, pattern = int(own["r"]), own["target_modules"], own.get("rank_pattern") or {}
    check_expressions("rank_pattern", pattern)
    exclude: Sequence[str] = config.exclude_modules or ()
    chosen: list[dict[str, int]] = []
    for index in range(shape.layers):
        among = config.layers_to_transform is None or index in config.layers_to_transform
        found = {}
        for linear in shape.linears:
            path = f"{shape.prefix}.{index}.{linear.path}"
            if among and _matches(path, targets) and not (exclude and _matches(path, exclude)):
                found[linear.path] = int(pattern.get(get_pattern_key(pattern.keys(), path), rank))
        chosen.append(found)
    if not any(chosen):
        names = [linear.name for linear in shape.linears]
        hint = nearest(targets, [*names, ALL]) if isinstance(targets, str) else ""
        raise InputError(
            f"target_modules {targets!r} matches no layer of the model{hint}, which has {', '.join(names)}."
        )
    return chosen


def adapter_parameters(shape: Shape, ranks: Sequence[dict[str, int]]) -> int:
    """Return the values of all A ``[rank, in]`` and B ``[out, rank]``."""
    sizes = {linear.path: linear.inputs + linear.outputs for linear in shape.linears}
    return sum(rank * sizes[path] for layer in ranks for path, rank in layer.items())


def adapter_tensors(ranks: Sequence[dict[str, int]]) -> int:
    """Return how many matrices an adapter has."""
    return 2 * sum(len(layer) for layer in ranks)


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
