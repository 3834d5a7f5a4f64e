"""Low-rank adaptation over frozen weights (LoRA, arXiv 2106.09685; QLoRA, arXiv 2305.14314, equation 5).

For each of several projections of one input ``x`` [rows, in] (query, key and value; gate and up; or a single one):

    y = x dequant(W)ᵀ + b + u Bᵀ           u = s drop(x) Aᵀ                           [rows, rank]

Gradients, with ``g = dy B`` [rows, rank], summed over the projections where they share the operand:

    dx = Σ dy dequant(W) + drop'(s g A)    dA = s gᵀ drop(x)    dB = dyᵀ u    db = Σ_rows dy

A, B and their gradients are fp32; products take factors in the dtype of ``x`` and sum in fp32, rounded once: what LoRA
adds is never rounded apart from the base product. The low-rank factors of all projections are stacked along the rank,
so that ``x`` is read once for all u and once for all dA. Kept for the backward: ``u``, the seed of the dropout mask,
which is drawn again, and, if an A is trained, ``x`` or what it is computed from (:mod:`halfbyte.nn.recomputed`); never
a dense W.

One mask serves all projections of a call, where PEFT draws one for each; every value is still dropped with the same
probability.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from halfbyte import kernels
from halfbyte.kernels import Sum, Term, Weight4bit, WeightInt8, pool
from halfbyte.nn.recomputed import Source, source_of


class LowRank(NamedTuple):
    """An adapter's part of a projection: ``s (x Aᵀ) Bᵀ``.

    Attributes:
        a: fp32 ``[rank, in]``.
        b: fp32 ``[out, rank]``.
        scaling: s, ``lora_alpha / rank``.
    """

    a: Tensor
    b: Tensor
    scaling: float


class Projection(NamedTuple):
    """A frozen weight with its adapters.

    Attributes:
        weight: ``[out, in]``; one that is dense has contiguous rows and gets no gradient.
        bias: ``[out]``, or None.
        adapters: any number, which add up.
    """

    weight: Weight4bit | WeightInt8 | Tensor
    bias: Tensor | None
    adapters: Sequence[LowRank]


def lora_linear(x: Tensor, projections: Sequence[Projection], dropout: float = 0.0) -> list[Tensor]:
    """Return what each projection makes of ``x``, differentiable in ``x``, the biases and the adapters.

    Args:
        x: ``[..., in]``, fp32, bf16 or fp16: the dtype to compute in.
        projections: one or more, of one ``in`` and any ``out``, rank and number format.
        dropout: the probability with which a value of ``x`` is zero for the adapters; the others are scaled up.

    Returns:
        for each projection ``[..., out]`` in the dtype of ``x``.
    """
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    biases = [None if p.bias is None else p.bias.to(x.dtype) for p in projections]
    adapters = [adapter for p in projections for adapter in p.adapters]
    call = _Call(projections, dropout if adapters else 0.0)
    factors = [adapter.a.contiguous() for adapter in adapters] + [adapter.b.contiguous() for adapter in adapters]
    ys: tuple[Tensor, ...] = _LoraLinear.apply(  # type: ignore[no-untyped-call]
        rows, call, source_of(x), *biases, *factors
    )
    return [y.view(*x.shape[:-1], y.shape[1]) for y in ys]


def draw_seed(generator: torch.Generator | None = None) -> int:
    """Return the seed of a call's dropout: the one number that it draws, from torch's own generator by default."""
    return int(torch.randint(2**62, (), generator=generator))


def noise_of(seed: int, dropout: float, like: Tensor, width: int) -> Tensor:
    """Return what a dropout multiplies values by, 0 or ``1 / (1 - dropout)``, the same for the same seed.

    It has the rows, dtype and device of ``like``. The probability is rounded to a multiple of 2⁻¹⁶, so that one draw of
    the generator serves four values.
    """
    rows, device = like.shape[0], like.device
    generator = torch.Generator(device).manual_seed(seed)
    draws = pool.empty((-(-rows * width // 4),), torch.int64, device)
    values = draws.random_(-(2**63), None, generator=generator).view(torch.int16)[: rows * width]
    dropped = min(round(dropout * 2**16), 2**16 - 1)
    kept = pool.empty((rows, width), torch.bool, device)
    torch.ge(values.view(rows, width), dropped - 2**15, out=kept)
    return pool.empty((rows, width), like.dtype, device).copy_(kept).div_(1 - dropped / 2**16)


class _Call:
    """What a call knows beside the values that it is differentiated in.

    Attributes:
        weights: of each projection.
        columns: of each projection and each of its adapters, where it lies among the stacked ranks.
        scalings: of all adapters in this order.
        rank: the sum of all ranks.
        dropout: the probability, and ``seed``, from torch's own generator.
    """

    def __init__(self, projections: Sequence[Projection], dropout: float) -> None:
        self.weights = [p.weight for p in projections]
        self.scalings = [adapter.scaling for p in projections for adapter in p.adapters]
        self.rank = 0
        self.columns: list[list[slice]] = []
        for p in projections:
            self.columns.append([])
            for adapter in p.adapters:
                self.columns[-1].append(slice(self.rank, self.rank + adapter.a.shape[0]))
                self.rank += adapter.a.shape[0]
        self.dropout = dropout
        self.seed = draw_seed() if dropout else 0

    def split(self, values: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any], Sequence[Any]]:
        """Return what is of the biases, of A and of B."""
        n = len(self.weights)
        return values[:n], values[n : n + len(self.scalings)], values[n + len(self.scalings) :]

    def noise(self, u: Tensor) -> Tensor | None:
        """Return what multiplies ``x`` for the adapters, the same each time; None without dropout."""
        return noise_of(self.seed, self.dropout, u, self.weights[0].shape[1]) if self.dropout else None

    def stacked(self, factors_a: Sequence[Tensor]) -> Tensor:
        """Return all ``s A``, ``[sum of ranks, in]``."""
        scaled = [a if s == 1 else a * s for a, s in zip(factors_a, self.scalings, strict=True)]
        return scaled[0] if len(scaled) == 1 else torch.cat(scaled)


def _times(x: Tensor, noise: Tensor | None) -> Tensor:
    return x if noise is None else torch.mul(x, noise, out=pool.empty(noise.shape, noise.dtype, noise.device))


class _LoraLinear(torch.autograd.Function):
    """The formulas at the head of this file. ``tensors``: the biases, all A, all B."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, call: _Call, source: Source | None, *tensors: Any) -> tuple[Tensor, ...]:
        biases, factors_a, factors_b = call.split(tensors)
        u = x.new_empty(x.shape[0], call.rank)
        if call.rank:
            kernels.matmul_sums([Sum([Term(_times(x, call.noise(u)), call.stacked(factors_a))], u)])
        bs = iter(factors_b)
        sums = []
        for weight, bias, columns in zip(call.weights, biases, call.columns, strict=True):
            terms = [Term(x, weight), *(Term(u[:, c], next(bs)) for c in columns)]
            sums.append(Sum(terms, pool.empty((x.shape[0], weight.shape[0]), x.dtype, x.device), bias))
        kernels.matmul_sums(sums)
        _, need_a, _ = call.split(ctx.needs_input_grad[3:])
        kept = () if not any(need_a) else (x,) if source is None else source.tensors
        ctx.save_for_backward(u, *factors_a, *factors_b, *kept)
        ctx.call = call
        ctx.compute = None if source is None else source.compute
        ctx.set_materialize_grads(False)
        return tuple(y.out for y in sums)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        u, *saved = ctx.saved_tensors
        factors, kept = saved[: 2 * len(call.scalings)], saved[2 * len(call.scalings) :]
        _, factors_a, factors_b = call.split([None] * len(call.weights) + factors)
        need_x, _, _, *needs = ctx.needs_input_grad
        need_biases, need_a, need_b = call.split(needs)
        dys = [None if dy is None else dy.contiguous() for dy in gradients]
        # of each adapter, the gradient of its projection and its columns of u and g
        adapters = [(dy, c) for dy, columns in zip(dys, call.columns, strict=True) for c in columns]

        rows, width = u.shape[0], call.weights[0].shape[1]
        g = u.new_zeros(rows, call.rank)
        sums = []
        if need_x or any(need_a):
            for (dy, c), b in zip(adapters, factors_b, strict=True):
                if dy is not None:
                    sums.append(Sum([Term(dy, b, transposed=False)], g[:, c]))
            kernels.matmul_sums(sums)

        sums = []
        noise = call.noise(u) if need_x or any(need_a) else None
        dx = through_adapters = da = None
        if need_x:
            dx = pool.empty((rows, width), u.dtype, u.device)
            terms = [Term(dy, w, transposed=False) for dy, w in zip(dys, call.weights, strict=True) if dy is not None]
            if call.rank:
                of_adapters = Term(g, call.stacked(factors_a), transposed=False)
                if call.dropout:
                    through_adapters = pool.empty((rows, width), u.dtype, u.device)
                    sums.append(Sum([of_adapters], through_adapters))
                else:
                    terms.append(of_adapters)
            sums.append(Sum(terms, dx))
        if any(need_a):
            x = kept[0] if ctx.compute is None else ctx.compute(*kept).reshape(rows, width)
            da = u.new_empty(call.rank, width, dtype=torch.float32)
            sums.append(Sum([Term(g.T, _times(x, noise), transposed=False)], da))
        dbs: list[Tensor | None] = [None] * len(adapters)
        for i, (dy, c) in enumerate(adapters):
            if dy is not None and need_b[i]:
                dbt = u.new_empty(c.stop - c.start, dy.shape[1], dtype=torch.float32)
                sums.append(Sum([Term(u[:, c].T, dy, transposed=False)], dbt))
                dbs[i] = dbt.T
        kernels.matmul_sums(sums)

        if dx is not None and through_adapters is not None and noise is not None:
            dx += noise.mul_(through_adapters)
        das: list[Tensor | None] = [None] * len(adapters)
        if da is not None:
            das = [
                da[c].mul_(s) if need else None for (_, c), s, need in zip(adapters, call.scalings, need_a, strict=True)
            ]
        dbiases = [None if dy is None or not need else dy.sum(0) for dy, need in zip(dys, need_biases, strict=True)]
        low_rank = [d if d is None else d.to(f.dtype) for d, f in zip([*das, *dbs], factors, strict=True)]
        return dx, None, None, *dbiases, *low_rank
