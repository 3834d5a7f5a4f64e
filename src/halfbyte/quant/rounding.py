"""Other values onto the grid that a 4-bit weight has already: its constants stay, codes alone are written anew.

An adapter's change of a weight is a few percent of the distance between two codes. What was trained lies around
dequant(W), just on the grid, so rounding W + Δ to nearest gives the codes of W back and loses Δ. Two ways keep it:

- **At random** (:func:`at_random`): to one of the two neighbours, so that the expectation is the target: Δ is kept in
  the sum over many weights, and independent noise is added.
- **Compensated** (:class:`Compensation`, :func:`compensated`): column by column, the error of each spread over those
  that are still to come so that the layer's outputs stay (GPTQ, arXiv 2210.17323, with its order by activation),
  towards the outputs T X of the model before rounding where the inputs X̂ of the rounded one are other already:

      W' = T + T (X - X̂)ᵀ X̂ (H + λ)⁻¹,   H = X̂ᵀ X̂,   λ = 1 % of the mean of H's diagonal

  (the least-squares solution of ‖X Tᵀ - X̂ W'ᵀ‖), which is then rounded.

:func:`nearest` is there to be compared with. The weight is ``[out, in]``, inputs are ``[tokens, in]``, all fp32.
"""

import dataclasses
import math

import torch
from torch import Tensor

from halfbyte.kernels import reference
from halfbyte.quant.weight import QuantizedWeight

DAMPING = 0.01
"""Of the mean of the diagonal of H, added to it; GPTQ's."""
COLUMNS = 128
"""That are rounded before what they leave is passed on to all the others."""


def nearest(target: Tensor, grid: QuantizedWeight) -> QuantizedWeight:
    """Return ``target`` rounded to the nearest values of ``grid``."""
    levels = _Levels(grid)
    return _packed(levels.codes(levels.nearest(target.float() / _divisor(levels.scale))), grid)


def at_random(target: Tensor, grid: QuantizedWeight, generator: torch.Generator) -> QuantizedWeight:
    """Return ``target`` rounded to one of its two neighbours in ``grid``, the nearer one the more likely.

    The expectation is the target, but for what lies outside the grid, which becomes its end.
    """
    levels = _Levels(grid)
    x = target.float() / _divisor(levels.scale)
    above = torch.searchsorted(levels.values, x).clamp_(1, len(levels.values) - 1)
    low, high = levels.values[above - 1], levels.values[above]
    share = ((x - low) / (high - low)).clamp_(0, 1)
    drawn = torch.rand(x.shape, generator=generator, dtype=torch.float32)
    return _packed(levels.codes(above - (drawn >= share).long()), grid)


class Compensation:
    """What the inputs of a layer say about its rounding; layers with the same inputs share it.

    Two matrices ``[in, in]`` are kept, four are there at most; the inputs are not needed any more, and are let go of
    one by one.

    Args:
        exact: the inputs X of the model before rounding, ``[tokens, in]`` in parts; the list is emptied.
        rounded: the inputs X̂ of the rounded one, the same; None: as if they were the exact ones (plain GPTQ).

    Attributes:
        order: the columns by falling magnitude of their inputs, in which they are rounded.
        factor: U with Uᵀ U = (H + λ)⁻¹ in that order, upper triangular.
    """

    def __init__(self, exact: list[Tensor], rounded: list[Tensor] | None = None) -> None:
        width = exact[0].shape[1]
        second = torch.zeros(width, width, dtype=torch.float32)
        self._apart = None if rounded is None else torch.zeros_like(second)
        while exact:
            before = exact.pop()
            now = before if rounded is None else rounded.pop()
            second.addmm_(now.T, now)
            if self._apart is not None:
                self._apart.addmm_((before - now).T, now)
        self.order = second.diagonal().argsort(descending=True, stable=True)
        damping = DAMPING * float(second.diagonal().mean()) or 1.0
        second.diagonal().add_(damping)
        second = second[self.order][:, self.order]  # each step below takes the place of the one before
        second = _cholesky(second)
        second = torch.cholesky_inverse(second)
        self.factor = _cholesky(second).T.contiguous()

    def target(self, weight: Tensor) -> Tensor:
        """Return W' of the weight T."""
        if self._apart is None:
            return weight
        shift = (weight @ self._apart)[:, self.order] @ self.factor.T @ self.factor
        made = weight.clone()
        made[:, self.order] += shift
        return made


def compensated(target: Tensor, grid: QuantizedWeight, inputs: Compensation) -> QuantizedWeight:
    """Return ``target`` rounded to values of ``grid`` so that the layer's outputs stay."""
    levels = _Levels(grid)
    order, factor = inputs.order, inputs.factor
    rest = inputs.target(target.float()).T[order].contiguous()  # [in, out]: a column is a row here
    scale = levels.scale.T[order].contiguous()
    del levels.scale
    found = torch.empty(rest.shape, dtype=torch.uint8)
    for first in range(0, len(rest), COLUMNS):
        last = min(first + COLUMNS, len(rest))
        own = factor[first:last, first:last]
        errors = torch.empty(last - first, rest.shape[1])
        for i in range(last - first):
            column = rest[first + i]
            found[first + i] = index = levels.nearest(column / _divisor(scale[first + i]))
            errors[i] = (column - levels.values[index] * scale[first + i]) / own[i, i]
            rest[first + i : last].addr_(own[i, i:], errors[i], alpha=-1)
        rest[last:].addmm_(factor[first:last, last:].T, errors, alpha=-1)
    del rest, scale
    places = torch.empty_like(found)
    places[order] = found
    return _packed(levels.codes(places.T.contiguous()), grid)


def _cholesky(x: Tensor) -> Tensor:
    """Return L with L Lᵀ = x, by fp64 where fp32 does not do: some channels may be thousands of times the others."""
    factor, failed = torch.linalg.cholesky_ex(x)
    exact: Tensor = torch.linalg.cholesky(x.double()).float() if failed else factor
    return exact


class _Levels:
    """The values of a grid.

    Attributes:
        values: ascending, before they are scaled.
        scale: what each element multiplies them by, in the shape of the weight.
    """

    def __init__(self, grid: QuantizedWeight) -> None:
        statistics = grid.statistics
        self.values, order = statistics.code.sort(stable=True)
        self._code = order.to(torch.uint8)
        absmax = reference.expand_absmax(statistics)
        self.scale = absmax.repeat_interleave(statistics.blocksize)[: math.prod(grid.shape)].view(grid.shape)
        self._middles = (self.values[1:] + self.values[:-1]) / 2

    def nearest(self, x: Tensor) -> Tensor:
        """Return the places of the nearest values."""
        return torch.bucketize(x, self._middles)

    def codes(self, places: Tensor) -> Tensor:
        """Return the codes of values by their places."""
        return self._code.index_select(0, places.reshape(-1).int()).view(places.shape)


def _divisor(scale: Tensor) -> Tensor:
    """Return what values are divided by to lie on the grid: their scale, but 1 where a block is zero."""
    return torch.where(scale == 0, 1.0, scale)


def _packed(codes: Tensor, grid: QuantizedWeight) -> QuantizedWeight:
    flat = codes.reshape(-1)
    if len(flat) % 2:
        flat = torch.cat([flat, flat.new_zeros(1)])
    packed = (flat[0::2] << 4) | flat[1::2]
    return dataclasses.replace(grid, packed=packed.view(-1, 1))
