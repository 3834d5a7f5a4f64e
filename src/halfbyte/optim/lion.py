"""Lion (arXiv 2302.06675, algorithm 2), its one moment in 32 bits or block-wise 8 bits, in memory or paged.

    p  <-  (1 - lr * weight_decay) p - lr sign(beta1 m + (1 - beta1) g)
    m  <-  beta2 m + (1 - beta2) g

in this order, as bitsandbytes (0.50.2) does it: over 8 bits in blocks of 256 with its signed dynamic map, over 32 bits
for tensors under 4096 elements. State of a parameter: ``step`` (an int), ``exp_avg`` and over 8 bits
``exp_avg_absmax``, as of :class:`halfbyte.optim.AdamW`, which keeps, pages, saves and loads it. A gradient that is not
finite leaves its element alone over 8 bits and sets its moment to zero; over 32 bits it spoils that element.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfbyte import kernels
from halfbyte.kernels.adamw_step import AdamwStep
from halfbyte.optim.adamw import BLOCKSIZE, AdamW, Layout
from halfbyte.quant import codebook


class Lion(AdamW):
    """Lion with a choice of where, and in how many bits, its state lives.

    Args:
        params: contiguous fp32, bf16 or fp16 parameters, or groups of them as in any torch optimizer.
        lr: a third to a tenth of AdamW's (section 5 of the paper).
        betas: of the step's direction and of the moment.
        weight_decay: three to ten times AdamW's.
        state_bits, paged, page_dir: as in :class:`halfbyte.optim.AdamW`.

    Raises:
        InputError: an argument is out of range, or a parameter is not of the kind above.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        state_bits: int = 32,
        paged: bool = False,
        page_dir: Path | str | None = None,
    ) -> None:
        super().__init__(params, lr, betas, 0.0, weight_decay, state_bits, paged, page_dir)

    def _layout(self, param: Tensor) -> Layout:
        return {name: entry for name, entry in super()._layout(param).items() if not name.startswith("exp_avg_sq")}

    def _batches(self, params: Sequence[Tensor], states: Sequence[dict[str, Any]]) -> list[tuple[list[int], Any]]:
        """Step each parameter by itself: there is no correction of the moment, so step counts do not matter."""
        return [([i], _Moment(p, state)) for i, (p, state) in enumerate(zip(params, states, strict=True))]


@dataclass
class _Moment:
    """A parameter and its moment."""

    param: Tensor
    state: dict[str, Any]

    def step(self, grads: list[Tensor], step: AdamwStep) -> None:
        """Step the parameter with the one gradient of ``grads``."""
        p, m, lr, (beta1, beta2) = self.param, self.state["exp_avg"], step.lr, step.betas
        grad = grads[0].float()
        in_8_bits = "exp_avg_absmax" in self.state
        if in_8_bits:
            code = codebook("dynamic", p.device)
            m = kernels.dequantize_coded(m, self.state["exp_avg_absmax"], code, BLOCKSIZE, torch.float32)
            finite = grad.isfinite()
            grad = grad.where(finite, 0.0)
            m = m.view(p.shape).where(finite, 0.0)
        moved = p.float() * (1 - lr * step.weight_decay) if step.weight_decay else p.float()
        moved = moved - lr * (m * beta1 + grad * (1 - beta1)).sign()
        p.copy_(moved.where(finite, p.float()) if in_8_bits else moved)
        if not in_8_bits:
            m.mul_(beta2).add_(grad, alpha=1 - beta2)
            return
        codes, absmax = kernels.quantize_coded(m * beta2 + grad * (1 - beta2), code, BLOCKSIZE)
        self.state["exp_avg"].copy_(codes.view(p.shape))
        self.state["exp_avg_absmax"].copy_(absmax)
