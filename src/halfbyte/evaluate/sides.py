"""A base and the adapter over it, measured one after the other in one process."""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from peft import PeftModel

from halfbyte.hf.layers.adapters import active_adapter


class Side(NamedTuple):
    """What is measured: its name, and the adapter that it computes with, or None for the base."""

    name: str
    adapter: str | None


def sides_of(model: Any, with_base: bool = True) -> list[Side]:
    """Return what there is to measure of a model: base and adapter, the adapter alone, or the model."""
    if not isinstance(model, PeftModel):
        return [Side("model", None)]
    return [*([Side("base", None)] if with_base else []), Side("adapter", active_adapter(model))]


@contextlib.contextmanager
def computing(model: Any, adapter: str | None) -> Iterator[None]:
    """Have a model compute with its active adapter meanwhile, or without any where ``adapter`` is None."""
    with (
        contextlib.nullcontext() if adapter is not None or not isinstance(model, PeftModel) else model.disable_adapter()
    ):
        yield
