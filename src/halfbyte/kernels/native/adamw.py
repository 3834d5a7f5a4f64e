"""AdamW steps over many tensors in one call (csrc/adamw.h)."""

import torch
from torch import Tensor

from halfbyte.kernels.adamw_step import AdamwStep
from halfbyte.kernels.native.runtime import TYPES, extension, threads, tier_index


def adamw_32bit(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    step: AdamwStep,
) -> None:
    """One AdamW step over many tensors with fp32 moments; gradients are of their parameter's dtype.

    The same on every tier: what torch fuses (``lerp``, ``addcmul``) is fused, and the square root is rounded correctly.
    So the moments are bitwise the reference's where torch does fuse (on x86 from AVX2 on), and a whole step is bitwise
    that of ``torch.optim.AdamW(fused=True)``, but for what is left over at the end of its vectors. The reference's root
    is torch's, that is MKL's, which misses the nearest fp32 value in a sixth of cases; therefore a parameter may be off
    by 2⁻²¹ of the update and one unit in its own last place.
    """
    extension.adamw_32bit(
        tier_index(),
        threads(),
        _constants(step),
        *_parameters(params, grads),
        [m.data_ptr() for m in exp_avgs],
        [v.data_ptr() for v in exp_avg_sqs],
    )


def adamw_8bit(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[tuple[Tensor, Tensor]],
    exp_avg_sqs: list[tuple[Tensor, Tensor]],
    code: Tensor,
    code_unsigned: Tensor,
    blocksize: int,
    step: AdamwStep,
) -> None:
    """One AdamW step over many tensors with block-wise 8-bit moments; gradients are of their parameter's dtype.

    Both tables must be ascending. Those whose values have few different distances, as dynamic maps do, are fast.
    """
    code, code_unsigned = code.contiguous(), code_unsigned.contiguous()
    extension.adamw_8bit(
        tier_index(),
        threads(),
        _constants(step),
        *_parameters(params, grads),
        [codes.data_ptr() for codes, _ in exp_avgs],
        [absmax.data_ptr() for _, absmax in exp_avgs],
        [codes.data_ptr() for codes, _ in exp_avg_sqs],
        [absmax.data_ptr() for _, absmax in exp_avg_sqs],
        code.data_ptr(),
        code_unsigned.data_ptr(),
        blocksize,
    )


def _parameters(params: list[Tensor], grads: list[Tensor]) -> tuple[list[int], list[int], list[int], list[int]]:
    """Return the parameters' types and sizes, their addresses, and those of their gradients.

    Autograd is told that the parameters change.
    """
    torch.autograd.graph.increment_version(params)
    return (
        [TYPES[p.dtype] for p in params],
        [p.numel() for p in params],
        [p.data_ptr() for p in params],
        [g.data_ptr() for g in grads],
    )


def _constants(step: AdamwStep) -> tuple[float, float, float, float, float, float, float, float]:
    """Return the members of ``struct Adamw`` in csrc/adamw.h, as the reference computes them."""
    t, lr, (beta1, beta2), eps, weight_decay = step
    return (
        1 - lr * weight_decay,
        beta1,
        1 - beta1,
        beta2,
        1 - beta2,
        (1 - beta2**t) ** 0.5,
        eps,
        -(lr / (1 - beta1**t)),
    )
