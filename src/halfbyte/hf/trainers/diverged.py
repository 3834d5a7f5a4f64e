"""Which batch and which module made a training step's loss or gradient NaN or infinite, found by running it again."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from halfbyte import tables

SHOWN = 6
"""So many samples of a batch are named one by one."""


def describe(
    model: nn.Module, loss_of: Callable[[dict[str, Any]], Tensor], batches: Sequence[dict[str, Any]], rows: Any
) -> str:
    """Run ``batches`` again, each from zero gradients, and say where a value that is not finite first came up.

    Gradients are lost, and random numbers (of dropout) differ from those of the first time.

    Args:
        model: whose parameters and modules are named.
        loss_of: gives a batch's loss.
        batches: those of the step.
        rows: the training data, in which the samples of a batch are looked up.
    """
    for batch in batches:
        place = _first_place(model, loss_of, batch)
        if place:
            return f"first in {place}, {_samples(batch, rows)}"
    return f"not again on running it once more, {_samples(batches[-1], rows)}"


def _first_place(model: nn.Module, loss_of: Callable[[dict[str, Any]], Tensor], batch: dict[str, Any]) -> str | None:
    model.zero_grad()
    with _outputs_watched(model) as found:
        loss = loss_of(batch)
    if found:
        return f"the output of {found[0]}"
    if not loss.isfinite():
        return "the loss itself"
    loss.backward()  # type: ignore[no-untyped-call]
    for name, parameter in reversed(list(model.named_parameters())):  # the backward comes from the end
        if parameter.grad is not None and not parameter.grad.isfinite().all():
            return f"the gradient of {name}"
    return None


@contextlib.contextmanager
def _outputs_watched(model: nn.Module) -> Iterator[list[str]]:
    """Collect the names of modules with an output that is not finite, in the order in which they finish."""
    found: list[str] = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if not all(x.isfinite().all() for x in _tensors(output)):
                found.append(name)

        return hook

    hooks = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor) and output.is_floating_point():
        yield output
    elif isinstance(output, Mapping):
        yield from _tensors(list(output.values()))
    elif isinstance(output, (list, tuple)):
        for item in output:
            yield from _tensors(item)


def _samples(batch: Mapping[str, Any], rows: Any) -> str:
    """The samples of a batch: their rows in the data, where they are found there, and their lengths."""
    ids = batch.get("input_ids")
    if not isinstance(ids, Tensor):
        return "on its batch"
    mask, positions = batch.get("attention_mask"), batch.get("position_ids")
    kept = [row[mask[i].bool()] if isinstance(mask, Tensor) else row for i, row in enumerate(ids)]
    if mask is None and isinstance(positions, Tensor) and len(ids) == 1:  # packed
        kept = list(ids[0].tensor_split((positions[0] == 0).nonzero()[1:, 0].cpu()))
    samples = [row.tolist() for row in kept]
    lengths = f"of {_listed([len(sample) for sample in samples])} tokens"
    if "input_ids" in (getattr(rows, "column_names", None) or ()):
        found = tables.places(rows, samples)
        if None not in found:
            numbers = all(isinstance(place, int) for place in found)
            place = f"rows {_listed(found)} of the training data" if numbers else _listed(found)
            return f"on {place}, {lengths}"
    return f"on a batch of sequences {lengths}"


def _listed(items: Sequence[Any]) -> str:
    shown = [str(item) for item in items[:SHOWN]]
    if len(items) > SHOWN:
        return f"{', '.join(shown)} and {len(items) - SHOWN} more"
    return " and ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)
