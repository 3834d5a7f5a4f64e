"""Where the time of a training step goes, by what is done.

torch's profiler records each operator with the shapes of its arguments; the native kernels, which are none of torch's,
are recorded through a wrapper around the functions of :mod:`halfbyte.kernels.native` while a profile runs. An event
counts for the time that no event within it takes.

- What runs in an optimizer's step is the optimizer's.
- What runs in the output head's operation (:mod:`halfbyte.nn.cross_entropy`, which takes its gradient at once) is the
  head's: its products, and the loss with all else.
- For the rest the name counts, its own or that of an event around it. A product of torch's that has LoRA's rank among
  its dimensions is LoRA's, and so is a native one without a 4-bit weight; LoRA products that a native kernel does
  together with the base's count as the base's.

No module gets a hook for it: layers with hooks run unfused (:mod:`halfbyte.hf.layers.fusion`).

What is between the events, the interpreter above all, is the rest. A profiled step is slower than others (each event
costs some microseconds), which makes the parts of many small operations look larger.
"""

import functools
import inspect
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from halfbyte.kernels import Sum, Weight4bit, native

PARTS = (
    "base products",
    "LoRA",
    "attention",
    "element-wise",
    "head products",
    "loss",
    "optimizer",
    "rest",
)
"""``base products``: with the frozen 4-bit weights. ``element-wise``: norms, rotary embedding, gating, residuals,
casts, copies, clipping. ``head products``: with the vocabulary. ``rest``: between the events."""

MATRIX_WORK = ("base products", "LoRA", "attention", "head products")
"""The parts that are matrix products; attention with the softmax that is in the same kernels."""

NATIVE = "halfbyte::"
HEAD = "_LinearCrossEntropy"
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "linear", "mkldnn_linear", "matmul", "_mkl_linear", "dot")
NATIVE_PARTS = {
    "attention": "attention",
    "adamw": "optimizer",
    "matmul": "base products",
    "low_rank": "LoRA",
    "dequantize": "base products",
}


class Profile:
    """A profile of this process, from its making to :meth:`stop`."""

    def __init__(self) -> None:
        self._functions = {
            name: function
            for name, function in inspect.getmembers(native, inspect.isfunction)
            if inspect.signature(function).parameters  # the others ask, they do not compute
        }
        for name, function in self._functions.items():
            setattr(native, name, _recorded(name, function))
        self._profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True)
        self._profiler.start()
        self._begun = time.perf_counter()

    def stop(self, rank: int) -> dict[str, float]:
        """Return the fraction of the time that each of :data:`PARTS` took, of all together 1; ``rank`` is LoRA's."""
        seconds = time.perf_counter() - self._begun
        self._profiler.stop()
        for name, function in self._functions.items():
            setattr(native, name, function)
        events = self._profiler.events() or ()  # type: ignore[no-untyped-call]
        found = dict.fromkeys(PARTS, 0.0)
        for event in events:
            found[_part(event, rank)] += event.self_cpu_time_total / 1e6
        found["rest"] += max(0.0, seconds - sum(found.values()))
        whole = sum(found.values())
        return {part: value / whole for part, value in found.items()}


def _recorded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def record(*arguments: Any, **options: Any) -> Any:
        low_rank = name == "matmul_sums" and not any(map(_has_weight, arguments[0]))
        with torch.profiler.record_function(NATIVE + ("low_rank" if low_rank else name)):
            return function(*arguments, **options)

    return record


def _has_weight(products: Sum) -> bool:
    return any(isinstance(term.factor, Weight4bit) for term in products.terms)


def _part(event: Any, rank: int) -> str:
    around = [event]
    while around[-1].cpu_parent is not None:
        around.append(around[-1].cpu_parent)
    names = [e.name for e in around]
    if any(name.startswith("Optimizer.step") for name in names):
        return "optimizer"
    part = _part_by_name(around, names, rank)
    if any(HEAD in name for name in names):
        return "head products" if part in ("base products", "LoRA") else "loss"
    return part


def _part_by_name(around: Sequence[Any], names: Sequence[str], rank: int) -> str:
    for name in names:
        if name.startswith(NATIVE):
            return next((part for word, part in NATIVE_PARTS.items() if word in name), "element-wise")
    if any("attention" in name for name in names):
        return "attention"
    operators = [e for e in around if e.name.startswith(("aten::", "mkldnn::"))]
    if any(e.name.split("::")[1] in PRODUCTS for e in operators):
        sizes = {size for e in operators for shape in e.input_shapes or () for size in _flat(shape)}
        return "LoRA" if rank in sizes else "base products"
    return "element-wise" if operators else "rest"


def _flat(shape: Any) -> list[int]:
    return [size for entry in shape for size in (_flat(entry) if isinstance(entry, list) else [entry])]
