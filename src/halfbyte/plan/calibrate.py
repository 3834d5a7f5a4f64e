"""How fast this machine is: the operations of a step timed by themselves, with the kernels that a run would use.

Each is timed at two sizes or more, and what fits them is kept: a time for each flop and one for each value that passes
(:class:`halfbyte.plan.machine.Rates`). It takes about half a minute, once: the result lies in the user's cache under
the processor's name, the instruction-set tier, the threads and the version.

Where nothing else runs the time that passes counts. Beside other work it says little; then the processor time of the
process over its threads does, which is what would have passed. The spread of the times is kept (``noise``).
"""

import datetime
import functools
import hashlib
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from pydantic import ValidationError
from torch import Tensor

from halfbyte.files import cache_folder, write_text
from halfbyte.nn import linear_cross_entropy, lora_linear, rms_norm, rotary
from halfbyte.nn.attention import attention, key_ranges
from halfbyte.nn.gated import gated
from halfbyte.nn.lora import LowRank, Projection
from halfbyte.optim import AdamW
from halfbyte.plan.layer_overhead import layer_seconds
from halfbyte.plan.machine import Machine, Rates, identity, stated_rates
from halfbyte.quant import quantize_4bit

PRODUCTS = ((576, 576, 1024), (576, 1536, 1024), (1536, 576, 256), (2048, 2048, 1024), (2048, 8192, 256),
            (4096, 4096, 512))  # fmt: skip
"""In, out and rows of products with 4-bit weights."""
BUDGET = 0.5
"""Seconds in which a piece of work is repeated."""
COMPANY = 0.1
"""Processor seconds a second of others from which on a machine is not alone."""
LEAST = 5
"""Times that it is repeated at least."""
STEP = 0.015
"""Seconds of an optimizer step beside its passes: batches, metrics, callbacks. Measured on two Zen 4 cores, stated for
all."""
DISK_BYTES = 2**28


def known(threads: int | None = None) -> Machine:
    """Return what is known of this machine: its measured rates, or stated ones."""
    threads = threads or torch.get_num_threads()
    about = identity(threads)
    try:
        found = Machine.model_validate_json(_file(about).read_text(encoding="utf-8"))
        if all(getattr(found, name) == value for name, value in about.items()):
            return found
    except (OSError, ValidationError):
        pass
    return stated(threads)


def stated(threads: int | None = None) -> Machine:
    """Return this machine with rates that are stated for its kind, whether it was measured or not."""
    threads = threads or torch.get_num_threads()
    return Machine(**identity(threads), rates=stated_rates(threads))


def calibrate(progress: Callable[[str], None] = lambda _: None) -> Machine:
    """Measure this machine's rates, keep them in the cache, and return them."""
    about = identity(torch.get_num_threads())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        rates = _measured(progress)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    machine = Machine(**about, measured=now, rates=rates)
    file = _file(about)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, machine.model_dump_json(indent=2) + "\n")
    return machine


def _file(about: dict[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    return cache_folder() / "machine" / f"{digest}.json"


class _Clock:
    """Times work, and remembers the widest spread.

    Attributes:
        threads: that the work is divided over; 1 for what one thread does alone.
        noise: the widest quartiles over their median so far.
        shared: whether something else ran beside.
    """

    def __init__(self) -> None:
        self.threads = torch.get_num_threads()
        self.noise = 0.0
        self.shared = False

    def seconds(self, work: Callable[[], Any]) -> float:
        """Return the median time of ``work``."""
        return self.both(lambda: (work(), lambda: None)[1])[0]

    def both(self, forward: Callable[[], Callable[[], Any]], threads: int | None = None) -> tuple[float, float]:
        """Return the median times of a forward, and of the backward that it returns."""
        forward()()
        times: list[tuple[float, ...]] = []
        begun, before = time.perf_counter(), _others()
        while len(times) < LEAST or time.perf_counter() - begun < BUDGET:
            clocks = [_clocks()]
            backward = forward()
            clocks.append(_clocks())
            backward()
            clocks.append(_clocks())
            times.append(tuple(b - a for way in (0, 1) for a, b in itertools.pairwise(c[way] for c in clocks)))
        shared = _others() - before > COMPANY * (time.perf_counter() - begun)
        self.shared = self.shared or shared
        threads = threads or self.threads
        kept = [(t[2] / threads, t[3] / threads) if shared else (t[0], t[1]) for t in times]
        low, middle, high = statistics.quantiles([a + b for a, b in kept], n=4)
        self.noise = max(self.noise, (high - low) / middle)
        return statistics.median(a for a, _ in kept), statistics.median(b for _, b in kept)


def _clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _others() -> float:
    """Return the processor seconds of the machine that were not this process's."""
    spent = psutil.cpu_times()
    return sum(spent) - spent.idle - getattr(spent, "iowait", 0.0) - time.process_time()


def _measured(progress: Callable[[str], None]) -> Rates:
    clock = _Clock()
    progress("products with 4-bit weights")
    forward, backward = _products(clock)
    progress("LoRA")
    lora_forward, lora_backward, dropout = _lora(clock)
    progress("attention")
    heads = {size: _attention(clock, size) for size in (64, 128)}
    progress("norms, gates, rotation")
    parts = _element_wise(clock)
    progress("the output head")
    head = _head(clock)
    progress("the optimizer")
    optimizer = _optimizer(clock)
    progress("layers of nearly no work")
    layer = layer_seconds(lambda forward: clock.both(forward, threads=1))
    progress("the disk")
    return Rates(
        forward=forward, backward=backward, lora_forward=lora_forward, lora_backward=lora_backward, attention=heads,
        head=head, optimizer=optimizer, dropout=dropout, layer=layer, step=STEP, disk=_disk(), noise=clock.noise,
        **parts,
    )  # fmt: skip


def fitted(work: Sequence[tuple[float, float]], seconds: Sequence[float]) -> tuple[float, float]:
    """Return the non-negative factors of two kinds of work that come nearest to the times, relative to each."""
    amounts, times = np.asarray(work, dtype=float), np.asarray(seconds, dtype=float)
    scaled = amounts / times[:, None]
    best: tuple[float, tuple[float, float]] | None = None
    for columns in ((0, 1), (0,), (1,)):
        found, *_ = np.linalg.lstsq(scaled[:, columns], np.ones(len(times)), rcond=None)
        factors = [0.0, 0.0]
        for column, factor in zip(columns, found, strict=True):
            factors[column] = float(factor)
        error = float(((scaled @ np.asarray(factors) - 1) ** 2).sum())
        if min(factors) >= 0 and (best is None or error < best[0]):
            best = error, (factors[0], factors[1])
    assert best is not None
    return best[1]


def _values(*shape: int, grad: bool = True) -> Tensor:
    return torch.randn(*shape, dtype=torch.float32).to(torch.bfloat16).requires_grad_(grad)


def _backward(y: Tensor, given: Tensor, *inputs: Tensor) -> Callable[[], Any]:
    return lambda: torch.autograd.grad(y, inputs, given)


def _projected(clock: _Clock, inputs: int, outputs: int, rows: int, rank: int, dropout: float) -> tuple[float, float]:
    weight = quantize_4bit(torch.randn(outputs, inputs, dtype=torch.float32) / 50)
    factors = [torch.randn(rank, inputs), torch.randn(outputs, rank)] if rank else []
    for factor in factors:
        factor.requires_grad_()
    adapters = [LowRank(factors[0], factors[1], 1.0)] if rank else []
    x, dy = _values(rows, inputs), _values(rows, outputs, grad=False)

    def forward() -> Callable[[], Any]:
        (y,) = lora_linear(x, [Projection(weight, None, adapters)], dropout)
        return _backward(y, dy, x, *factors)

    return clock.both(forward)


def _products(clock: _Clock) -> tuple[tuple[float, float], tuple[float, float]]:
    times = [_projected(clock, *size, 0, 0.0) for size in PRODUCTS]
    work = [(2.0 * rows * inputs * outputs, float(rows * (inputs + outputs))) for inputs, outputs, rows in PRODUCTS]
    return fitted(work, [t for t, _ in times]), fitted(work, [t for _, t in times])


def _lora(clock: _Clock) -> tuple[tuple[float, float], tuple[float, float], float]:
    """Return what LoRA takes beyond the base's products, and dropout beyond that."""
    rows, work, extra, dropouts = 1024, [], [], []
    for inputs, outputs in ((2048, 512), (512, 2048)):
        bare = _projected(clock, inputs, outputs, rows, 0, 0.0)
        for rank in (16, 64, 128):
            found = _projected(clock, inputs, outputs, rows, rank, 0.0)
            work.append((2.0 * rows * rank * (inputs + outputs), float(rows * (inputs + outputs))))
            extra.append([max(found[way] - bare[way], 1e-2 * bare[way]) for way in (0, 1)])
        dropped = _projected(clock, inputs, outputs, rows, rank, 0.1)
        dropouts.append(max(sum(dropped) - sum(found), 0.0) / (rows * inputs))
    back = [(2 * flop, values) for flop, values in work]
    return fitted(work, [x[0] for x in extra]), fitted(back, [x[1] for x in extra]), statistics.median(dropouts)


def _attention(clock: _Clock, size: int) -> tuple[float, float, float]:
    """Return the times of a flop forward and backward, and of a query's value."""
    heads, groups = 8, 4
    work, times = [], []
    for batch, length in ((4, 256), (1, 2048)):
        q = _values(batch, heads, length, size)
        k, v = (_values(batch, groups, length, size) for _ in range(2))
        dout = _values(batch, heads, length, size, grad=False)
        ranges = key_ranges((batch, length, length), ahead=0)
        assert ranges is not None

        def forward_of(q: Tensor = q, k: Tensor = k, v: Tensor = v, ranges: Tensor = ranges, d: Tensor = dout) -> Any:
            return _backward(attention(q, k, v, ranges), d, q, k, v)

        times.append(clock.both(forward_of))
        pairs = batch * length**2 / 2
        work.append((4 * pairs * heads * size, float(batch * length * heads * size)))
    forward, value = fitted(work, [t for t, _ in times])
    left = [
        max(t - 2 * value * values, t / 10) / (2.5 * flop) for (flop, values), (_, t) in zip(work, times, strict=True)
    ]
    return forward, left[-1], value


def _element_wise(clock: _Clock) -> dict[str, tuple[float, float]]:
    rows, width = 2048, 2048
    x, other, dy = (_values(rows, width) for _ in range(3))
    weight, heads = _values(width, grad=False), _values(1, rows, 16, 128)
    keys, angles = _values(1, rows, 16, 128), _values(1, rows, 128, grad=False)
    dh = dy.detach()

    def turned() -> Callable[[], Any]:
        q, k = rotary(heads, keys, angles, angles)
        return lambda: torch.autograd.grad((q, k), (heads, keys), (dheads, dheads))

    dheads = _values(1, rows, 16, 128, grad=False)

    def normed() -> Callable[[], Any]:
        h, y = rms_norm(x, weight, other, eps=1e-6)
        return lambda: torch.autograd.grad((h, y), (x, other), (dh, dh))

    found = {
        "norm": (normed, 1),
        "gated": (lambda: _backward(gated(x, other, "silu"), dh, x, other), 1),
        "rotary": (turned, 2),
        "addition": (lambda: _backward(x + other, dh, x, other), 1),
    }
    times = {name: (clock.both(work), count) for name, (work, count) in found.items()}
    return {name: (t[0] / (count * rows * width), t[1] / (count * rows * width)) for name, (t, count) in times.items()}


def _head(clock: _Clock) -> tuple[float, float]:
    rows, vocabulary = 512, 16_384
    work, times = [], []
    for width in (576, 2048):
        hidden, weight = _values(rows, width), _values(vocabulary, width, grad=False)
        labels = torch.randint(vocabulary, (rows,))
        times.append(clock.seconds(functools.partial(linear_cross_entropy, hidden, weight, labels)))
        work.append((4.0 * rows * vocabulary * width, float(rows * vocabulary)))
    return fitted(work, times)


def _optimizer(clock: _Clock) -> tuple[float, float]:
    """Of a step with the gradients' norm: a parameter, a tensor."""
    work, times = [], []
    for count, size in ((256, 16_384), (8, 2**20)):
        parameters = [torch.randn(size).requires_grad_() for _ in range(count)]
        for parameter in parameters:
            parameter.grad = torch.randn(size)
        optimizer = AdamW(parameters, lr=1e-4, state_bits=8)

        def step(parameters: list[Tensor] = parameters, optimizer: Any = optimizer) -> None:
            torch.nn.utils.clip_grad_norm_(parameters, 0.3)
            optimizer.step()

        times.append(clock.seconds(step))
        work.append((float(count * size), float(count)))
    return fitted(work, times)


def _disk() -> float:
    """Return the bytes a second of reading a file that is not in memory, one piece after the other."""
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    piece = os.urandom(2**20)
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        for _ in itertools.repeat(None, DISK_BYTES // len(piece)):
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        begun = time.perf_counter()
        with open(file.name, "rb", buffering=0) as again:
            while again.read(2**23):
                pass
        return DISK_BYTES / (time.perf_counter() - begun)
