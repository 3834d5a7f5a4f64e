"""What is here: processor, kernels, threads, memory; and how fast it is, measured or stated.

:class:`Rates` is what the formulas of time (:mod:`halfbyte.plan.times`) multiply work by. Each is a time for a piece of
work, so that a step's time is a sum of products. They come from :mod:`halfbyte.plan.calibrate`; where nobody has
measured, from :func:`stated_rates`, and everything made of them is called an estimate.
"""

from typing import Any

from pydantic import BaseModel, ConfigDict

from halfbyte import __version__
from halfbyte.kernels import native
from halfbyte.runs.circumstances import kernels_in_force, processor


class Rates(BaseModel):
    """How long pieces of work take here, in seconds.

    Attributes:
        forward: of ``y = x Wᵀ`` with 4-bit W: a flop, a value that it reads or writes (a row's in and out).
        backward: likewise of its gradient for x.
        lora_forward: of LoRA's products in the forward, a flop, and a value that its layers read or write.
        lora_backward: likewise in the backward.
        attention: by head size, of a flop in the forward, a flop in the backward, a value of a query in both.
        norm: of a value, RMSNorm forward and backward; gated, rotary, addition: likewise of theirs.
        head: of the output head with its loss and gradient, a flop, and a logit.
        optimizer: of a step of AdamW in 8 bits, a parameter, and a tensor.
        dropout: of a value that dropout passes, forward and backward together.
        layer: of a layer's forward and backward, beside its work: what Python takes.
        step: of an optimizer step, beside all else.
        disk: bytes a second, read one after the other.
        noise: the spread of the measurement, the widest quartiles over their median.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    forward: tuple[float, float]
    backward: tuple[float, float]
    lora_forward: tuple[float, float]
    lora_backward: tuple[float, float]
    attention: dict[int, tuple[float, float, float]]
    norm: tuple[float, float]
    gated: tuple[float, float]
    rotary: tuple[float, float]
    addition: tuple[float, float]
    head: tuple[float, float]
    optimizer: tuple[float, float]
    dropout: float
    layer: tuple[float, float]
    step: float
    disk: float
    noise: float = 0.0


class Machine(BaseModel):
    """A processor with its rates.

    Attributes:
        name: the processor's.
        kernels: provider and instruction-set tier.
        threads: of torch.
        version: of halfbyte.
        measured: when the rates were measured; empty: they are stated ones.
        rates: how fast it is.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    name: str
    kernels: str
    threads: int
    version: str
    measured: str = ""
    rates: Rates

    @property
    def is_measured(self) -> bool:
        """Whether the rates are this machine's own."""
        return bool(self.measured)


def identity(threads: int) -> dict[str, Any]:
    """Return what rates depend on: they are measured again where any of it is other."""
    return {"name": processor(), "kernels": kernels_in_force(), "threads": threads, "version": __version__}


PEAK = {"amx": 1.0e12, "avx512": 2.4e11, "avx2": 6.0e10, "neon": 5.0e10, "scalar": 4.0e9}
"""Flop a second and thread of products with 4-bit weights, by tier. avx512 was measured on Zen 4 (benchmarks/results),
avx2 on Zen 3; amx, neon and scalar are guesses."""


def stated_rates(threads: int) -> Rates:
    """Return rates for a machine that nobody has measured, by its tier and threads; within a factor of two or three."""
    tier = native.tier() if native.available() else "scalar"
    flop = 1 / (PEAK.get(tier, PEAK["scalar"]) * threads)
    value = 2.5e-10 / threads  # 2 bytes read, 2 written, at 16 GB/s a thread
    return Rates(
        forward=(flop, 4 * value),
        backward=(1.1 * flop, 4 * value),
        lora_forward=(1.5 * flop, value),
        lora_backward=(1.5 * flop, 2 * value),
        attention={64: (2.5 * flop, 2.5 * flop, 8 * value), 128: (1.8 * flop, 2 * flop, 8 * value)},
        norm=(2 * value, 3 * value),
        gated=(4 * value, 6 * value),
        rotary=(2 * value, 2 * value),
        addition=(2 * value, value),
        head=(1.5 * flop, 4 * value),
        optimizer=(4e-9 / threads, 2e-6),
        dropout=20 * value,
        layer=(8e-4, 1.2e-3),
        step=0.02,
        disk=1.0e9,
    )
