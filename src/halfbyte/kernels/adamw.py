"""AdamW steps over many tensors: arguments checked, then handed to a provider.

Formulas, shapes and dtypes are those of :mod:`halfbyte.kernels.reference`; errors as in
:mod:`halfbyte.kernels.checks`.

An optimizer steps the same hundreds of small tensors again and again, and checking each costs as much as stepping it.
:class:`Adamw32bit` and :class:`Adamw8bit` hold such tensors and check them when they are made. At each step they look
whether parameters and gradients are what they were (dtype, shape, device, contiguous) and whether state lies where it
lay, and if anything is not so, check everything again. Not noticed: state whose memory is given another shape or dtype
through ``.data``; its size is that of the memory still.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from halfbyte.kernels.adamw_step import AdamwStep
from halfbyte.kernels.checks import FLOATING, check_absmax, check_blocksize, check_code
from halfbyte.kernels.provider import provider_for

CodedMoment = tuple[Tensor, Tensor]
"""Codes and ``absmax`` of a moment, as :func:`halfbyte.kernels.quantize_coded` makes them."""


def adamw_32bit(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    step: AdamwStep,
) -> None:
    """One AdamW step over many tensors of one device, in place, with fp32 moments.

    See :func:`halfbyte.kernels.reference.adamw_32bit`.
    """
    if not params:
        return
    device = params[0].device
    _check_32bit(params, grads, exp_avgs, exp_avg_sqs, device)
    provider_for(device).adamw_32bit(params, grads, exp_avgs, exp_avg_sqs, step)


def adamw_8bit(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[CodedMoment],
    exp_avg_sqs: list[CodedMoment],
    code: Tensor,
    code_unsigned: Tensor,
    blocksize: int,
    step: AdamwStep,
) -> None:
    """One AdamW step over many tensors of one device, in place, with block-wise 8-bit moments.

    See :func:`halfbyte.kernels.reference.adamw_8bit`.
    """
    if not params:
        return
    device = params[0].device
    _check_8bit(params, grads, exp_avgs, exp_avg_sqs, (code, code_unsigned), blocksize, device)
    provider_for(device).adamw_8bit(params, grads, exp_avgs, exp_avg_sqs, code, code_unsigned, blocksize, step)


class _Checked:
    """What parameters and state were when they were checked."""

    def __init__(self, params: Sequence[Tensor], state: Sequence[Tensor]) -> None:
        self.state = state
        self.device = params[0].device
        self.dtypes = [p.dtype for p in params]
        self.shapes = [p.shape for p in params]
        self.addresses = [x.data_ptr() for x in state]

    def hold(self, params: Sequence[Tensor], grads: Sequence[Tensor]) -> bool:
        """Return whether they still are that, and ``grads`` fit."""
        device = self.device
        for p, g, dtype, shape in zip(params, grads, self.dtypes, self.shapes, strict=True):
            if not (
                p.dtype == dtype
                and g.dtype == dtype
                and p.shape == shape
                and g.shape == shape
                and p.device == device
                and g.device == device
                and p.is_contiguous()
                and g.is_contiguous()
            ):
                return False
        return [x.data_ptr() for x in self.state] == self.addresses


class Adamw32bit:
    """Tensors of one device, at least one, that :func:`adamw_32bit` steps together again and again; arguments as there.

    With ``joined`` they are copied into one flat tensor for each step, and back: for small ones less work than a dozen
    calls for each, and the bits are the same.
    """

    def __init__(
        self, params: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor], joined: bool = False
    ) -> None:
        self.params, self.exp_avgs, self.exp_avg_sqs, self.joined = params, exp_avgs, exp_avg_sqs, joined
        self._prepare(params)

    def step(self, grads: list[Tensor], step: AdamwStep) -> None:
        """Take one step; ``grads`` are those of the parameters, in their order."""
        if not self._checked.hold(self.params, grads):
            self._prepare(grads)
        p, m, v, g = self.params, self.exp_avgs, self.exp_avg_sqs, grads
        if self.joined:
            p, m, v, g = ([torch.cat(x)] for x in (*self._flat, [x.view(-1) for x in grads]))
        provider_for(self._checked.device).adamw_32bit(p, g, m, v, step)
        if self.joined:
            for old, (new,) in zip(self._flat, (p, m, v), strict=True):
                torch._foreach_copy_(old, torch.split_with_sizes(new, self._sizes))

    def _prepare(self, grads: list[Tensor]) -> None:
        _check_32bit(self.params, grads, self.exp_avgs, self.exp_avg_sqs, self.params[0].device)
        self._checked = _Checked(self.params, self.params + self.exp_avgs + self.exp_avg_sqs)
        tensors = self.params, self.exp_avgs, self.exp_avg_sqs
        self._flat = [[x.detach().view(-1) for x in each] for each in tensors]  # share memory and version
        self._sizes = [p.numel() for p in self.params]


class Adamw8bit:
    """Tensors of one device, at least one, that :func:`adamw_8bit` steps together repeatedly; arguments as there."""

    def __init__(
        self,
        params: list[Tensor],
        exp_avgs: list[CodedMoment],
        exp_avg_sqs: list[CodedMoment],
        code: Tensor,
        code_unsigned: Tensor,
        blocksize: int,
    ) -> None:
        self.params, self.exp_avgs, self.exp_avg_sqs = params, exp_avgs, exp_avg_sqs
        self.code, self.code_unsigned, self.blocksize = code, code_unsigned, blocksize
        self._prepare(params)

    def step(self, grads: list[Tensor], step: AdamwStep) -> None:
        """Take one step; ``grads`` are those of the parameters, in their order."""
        if not self._checked.hold(self.params, grads):
            self._prepare(grads)
        provider_for(self._checked.device).adamw_8bit(
            self.params, grads, self.exp_avgs, self.exp_avg_sqs, self.code, self.code_unsigned, self.blocksize, step
        )

    def _prepare(self, grads: list[Tensor]) -> None:
        tables = self.code, self.code_unsigned
        _check_8bit(self.params, grads, self.exp_avgs, self.exp_avg_sqs, tables, self.blocksize, self.params[0].device)
        moments = [x for moment in (*self.exp_avgs, *self.exp_avg_sqs) for x in moment]
        self._checked = _Checked(self.params, [*moments, *tables])


def _check_32bit(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    device: torch.device,
) -> None:
    for i, (param, grad, m, v) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, strict=True)):
        _check_step(i, param, grad, device)
        for name, x in (("exp_avgs", m), ("exp_avg_sqs", v)):
            _check_like(name, i, x, torch.float32, param)


def _check_8bit(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[CodedMoment],
    exp_avg_sqs: list[CodedMoment],
    tables: tuple[Tensor, Tensor],
    blocksize: int,
    device: torch.device,
) -> None:
    check_blocksize(blocksize)
    for table in tables:
        check_code(table, range(256, 257), device)
    for i, (param, grad, first, second) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, strict=True)):
        _check_step(i, param, grad, device)
        for name, (codes, absmax) in (("exp_avgs", first), ("exp_avg_sqs", second)):
            _check_like(name, i, codes, torch.uint8, param)
            check_absmax(absmax, torch.float32, param.numel(), blocksize, device)


def _check_step(i: int, param: Tensor, grad: Tensor, device: torch.device) -> None:
    if param.dtype not in FLOATING or param.device != device or not param.is_contiguous():
        raise TypeError(
            f"params[{i}] is {param.dtype} on {param.device} with strides {param.stride()}; it must be float32, "
            f"bfloat16 or float16, on {device} and contiguous"
        )
    _check_like("grads", i, grad, param.dtype, param)


def _check_like(name: str, i: int, x: Tensor, dtype: torch.dtype, param: Tensor) -> None:
    if x.dtype != dtype or x.device != param.device or not x.is_contiguous():
        raise TypeError(
            f"{name}[{i}] is {x.dtype} on {x.device} with strides {x.stride()}; it must be {dtype} on {param.device} "
            "and contiguous"
        )
    if x.shape != param.shape:
        raise ValueError(f"{name}[{i}] has shape {tuple(x.shape)}; its parameter has {tuple(param.shape)}")
