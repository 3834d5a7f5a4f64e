"""Who carries out an operation: the native kernels on a CPU, bitsandbytes on CUDA, the torch reference elsewhere.

A provider is a module with the functions of :class:`Provider`; it may take its arguments for granted, since the
operations have checked them.
"""

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Protocol

import torch
from torch import Tensor

from halfbyte.errors import InputError, nearest
from halfbyte.kernels import bitsandbytes, native, reference
from halfbyte.kernels.adamw_step import AdamwStep
from halfbyte.kernels.softmax import RunningSoftmax
from halfbyte.kernels.terms import Sum
from halfbyte.kernels.weights import Weight4bit, WeightInt8


class Provider(Protocol):
    """The operations; formulas, shapes and dtypes are in :mod:`halfbyte.kernels.reference`."""

    def quantize_coded(self, x: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]: ...

    def dequantize_coded(
        self, codes: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype
    ) -> Tensor: ...

    def quantize_4bit(self, x: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]: ...

    def dequantize_4bit(self, weight: Weight4bit, dtype: torch.dtype) -> Tensor: ...

    def matmul_4bit(self, x: Tensor, weight: Weight4bit, bias: Tensor | None) -> Tensor: ...

    def matmul_4bit_dx(self, dy: Tensor, weight: Weight4bit) -> Tensor: ...

    def quantize_int8(self, x: Tensor, blocksize: int) -> WeightInt8: ...

    def dequantize_int8(self, weight: WeightInt8, dtype: torch.dtype) -> Tensor: ...

    def matmul_sums(self, sums: Sequence[Sum]) -> None: ...

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, ranges: Tensor, scale: float, softcap: float
    ) -> tuple[Tensor, Tensor]: ...

    def attention_backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        ranges: Tensor,
        scale: float,
        softcap: float,
    ) -> tuple[Tensor, Tensor, Tensor]: ...

    def adamw_32bit(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor],
        step: AdamwStep,
    ) -> None: ...

    def adamw_8bit(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        exp_avgs: list[tuple[Tensor, Tensor]],
        exp_avg_sqs: list[tuple[Tensor, Tensor]],
        code: Tensor,
        code_unsigned: Tensor,
        blocksize: int,
        step: AdamwStep,
    ) -> None: ...

    def rms_norm(
        self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float, rounded: bool
    ) -> tuple[Tensor, Tensor, Tensor]: ...

    def rms_norm_gradient(
        self, dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor, scale: Tensor, offset: float
    ) -> Tensor: ...

    def rms_norm_weight_gradient(self, dy: Tensor, h: Tensor, scale: Tensor) -> Tensor: ...

    def gated(self, gate: Tensor, up: Tensor, name: str) -> Tensor: ...

    def gated_gradient(self, dy: Tensor, gate: Tensor, up: Tensor, name: str, dgate: Tensor, dup: Tensor) -> None: ...

    def rotary(self, x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor: ...

    def fold_softmax(
        self,
        logits: Tensor,
        labels: Tensor,
        first: int,
        softmax: RunningSoftmax,
        scale: float,
        cap: float | None,
        gradient: bool,
    ) -> None: ...


DEFAULTS = {"cpu": "native", "cuda": "bitsandbytes"}
"""The provider for each type of device, where it is installed; otherwise the reference."""

_forced: ContextVar[str | None] = ContextVar("halfbyte_provider", default=None)


def providers() -> dict[str, Provider]:
    """Return the providers that this installation has, by name."""
    known: dict[str, Provider] = {"native": native} if native.available() else {}
    if bitsandbytes.available():
        known["bitsandbytes"] = bitsandbytes
    return known | {"reference": reference}


def provider_for(device: torch.device) -> Provider:
    """Return the provider in force for tensors on ``device``."""
    known = providers()
    forced = _forced.get()
    if forced is not None:
        return known[forced]
    return known.get(DEFAULTS.get(device.type, ""), reference)


@contextlib.contextmanager
def use_provider(name: str) -> Iterator[None]:
    """Carry out every operation in this context with the provider ``name``.

    Raises:
        InputError: this installation has no such provider.
    """
    known = providers()
    if name not in known:
        raise InputError(f"There is no provider {name!r} here{nearest(name, known)}; there is {', '.join(known)}.")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)
