"""Experts: projections with as many frozen weights as there are experts, of which each row takes its own's.

Of a row ``x`` that the router gave to expert ``e``, with an adapter of the paper's equation 5 on each expert:

    y = x dequant(W_e)ᵀ + b_e + s (drop(x) A_eᵀ) B_eᵀ

Rows are sorted by expert, so that an expert's lie together; all experts' products are one list of sums
(:func:`halfbyte.kernels.matmul_sums`), done in one parallel region: none waits for another, few rows take the kernels
of few rows, and a weight is only read where it has rows. Gradients are those of :mod:`halfbyte.nn.lora`, expert by
expert; an expert without rows gets zeros. What is kept for the backward, and in which dtypes, is as there.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag

from halfbyte import kernels
from halfbyte.kernels import Sum, Term, Weight4bit, WeightInt8, pool
from halfbyte.nn.lora import draw_seed, noise_of
from halfbyte.nn.recomputed import Source, recomputed, source_of

Weight = Weight4bit | WeightInt8 | Tensor


class Routes(NamedTuple):
    """Which rows go to which experts.

    Attributes:
        tokens: int64 ``[rows]``, which token each row is a copy of, an expert's rows one after the other.
        places: int64 ``[rows]``, which of all choices ``[tokens, k]``, flattened, each row is.
        by_token: int64 ``[rows]``, the rows of the first token, then those of the second, and so on.
        firsts: int64 ``[tokens]``, where a token's rows begin in ``by_token``.
        bounds: for each expert that has rows, its number, its first row and the one after its last.
    """

    tokens: Tensor
    places: Tensor
    by_token: Tensor
    firsts: Tensor
    bounds: Sequence[tuple[int, int, int]]


class StackedLowRank(NamedTuple):
    """An adapter's part of a projection: ``s (x A_eᵀ) B_eᵀ``.

    Attributes:
        a: fp32 ``[experts, rank, in]``.
        bt: fp32 ``[experts, rank, out]``, each expert's B transposed.
        scaling: s, ``lora_alpha / rank``.
    """

    a: Tensor
    bt: Tensor
    scaling: float


def routes_of(chosen: Tensor, experts: int) -> Routes:
    """Return the rows of each expert.

    Args:
        chosen: int64 ``[tokens, k]``, the experts that each token goes to; the number of experts stands for none.
        experts: how many there are.

    Raises:
        ValueError: there is no such expert.
    """
    flat = chosen.reshape(-1)
    if flat.numel() and (int(flat.min()) < 0 or int(flat.max()) > experts):
        wrong = int(flat.min()) if int(flat.min()) < 0 else int(flat.max())
        raise ValueError(f"the router chose expert {wrong} of {experts}; experts are numbered from 0")
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=experts)[:experts].tolist()
    bounds, first = [], 0
    for expert, count in enumerate(counts):
        if count:
            bounds.append((expert, first, first + count))
        first += count
    places = order[:first]
    tokens = places // chosen.shape[1]
    counts_of_tokens = torch.bincount(tokens, minlength=len(chosen))
    return Routes(tokens, places, places.argsort(), counts_of_tokens.cumsum(0) - counts_of_tokens, bounds)


def take_rows(x: Tensor, routes: Routes) -> Tensor:
    """Return the token of each row, ``[rows, width]``; a projection that would keep it keeps ``x`` instead, or its."""
    rows: Tensor = _TakeRows.apply(x, routes)  # type: ignore[no-untyped-call]
    source = source_of(x)
    if source is None:
        return recomputed(rows, lambda x: _taken(x, routes), x)
    return recomputed(rows, lambda *kept: _taken(source.compute(*kept), routes), *source.tensors)


def weigh_rows(x: Tensor, shares: Tensor, routes: Routes) -> Tensor:
    """Return each row times what its choice counts.

    Args:
        x: ``[rows, width]``; where it can be computed again, neither it nor the result is kept.
        shares: ``[tokens, k]``, in the dtype of ``x``.
        routes: of the rows.
    """
    weights, source = shares.reshape(-1).index_select(0, routes.places), source_of(x)
    weighed: Tensor = _Weigh.apply(x, weights, source)  # type: ignore[no-untyped-call]
    if source is None:
        return weighed
    compute = source.compute
    return recomputed(
        weighed, lambda weights, *kept: _times(compute(*kept), weights.unsqueeze(1)), weights, *source.tensors
    )


def turned(b: Tensor, experts: int) -> Tensor:
    """Return Bᵀ of each expert, ``[experts, r, out]``: a view of PEFT's ``[out, r·experts]``, columns apart.

    Its gradient comes from the pool, laid out as B, so that autograd keeps it as it is: one made in the heap beside
    another of its size leaves gaps there, layer after layer.
    """
    view: Tensor = _Turned.apply(b, experts)  # type: ignore[no-untyped-call]
    return view


def sum_rows(y: Tensor, routes: Routes) -> Tensor:
    """Return the sum over each token's rows, ``[tokens, width]``, in fp32 and rounded once."""
    summed: Tensor = _SumRows.apply(y, routes)  # type: ignore[no-untyped-call]
    return summed


def _taken(x: Tensor, routes: Routes) -> Tensor:
    rows = pool.empty((len(routes.tokens), x.shape[1]), x.dtype, x.device)
    return torch.index_select(x, 0, routes.tokens, out=rows)


def _summed(y: Tensor, routes: Routes) -> Tensor:
    return embedding_bag(routes.by_token, y, routes.firsts, mode="sum")


class _TakeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, routes: Routes) -> Tensor:
        ctx.routes = routes
        return _taken(x, routes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return _summed(dy.contiguous(), ctx.routes), None


class _SumRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, routes: Routes) -> Tensor:
        ctx.routes = routes
        return _summed(y, routes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return _taken(dy, ctx.routes), None


class _Turned(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, b: Tensor, experts: int) -> Tensor:
        return b.view(len(b), -1, experts).permute(2, 1, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dbt: Tensor) -> tuple[Tensor | None, ...]:
        db = pool.empty(dbt.shape[::-1], dbt.dtype, dbt.device).copy_(dbt.permute(2, 1, 0))
        return db.flatten(1), None


class _Weigh(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, source: Source | None) -> Tensor:
        ctx.save_for_backward(weights, *((x,) if source is None else source.tensors))
        ctx.compute = None if source is None else source.compute
        return _times(x, weights.unsqueeze(1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        weights, *kept = ctx.saved_tensors
        dweights = None
        if ctx.needs_input_grad[1]:
            x = kept[0] if ctx.compute is None else ctx.compute(*kept)
            dweights = _times(dy, x).sum(1)  # torch adds in fp32; asked for it, it casts all first
        return _times(dy, weights.unsqueeze(1)), dweights, None


def experts_linear(
    x: Tensor,
    routes: Routes,
    weights: Mapping[int, Sequence[Weight]],
    biases: Mapping[int, Tensor] | None = None,
    adapters: Sequence[StackedLowRank] = (),
    dropout: float = 0.0,
    *,
    as_many: bool = False,
) -> Tensor:
    """Return what each row's expert makes of it, differentiable in ``x`` and the adapters.

    Args:
        x: ``[rows, in]``, fp32, bf16 or fp16: the dtype to compute in.
        routes: of the rows.
        weights: of each expert that has rows, one or more of ``[out, in]``, whose results stand beside each other
            (gate and up).
        biases: of each of these experts ``[sum of out]``, frozen, or None.
        adapters: any number, which add up.
        dropout: the probability with which a value of ``x`` is zero for the adapters; the others are scaled up.
        as_many: whether a row's result does not depend on how many rows its expert has; few take longer then.

    Returns:
        ``[rows, sum of out]`` in the dtype of ``x``.
    """
    cast = None if biases is None else {e: bias.detach().to(x.dtype) for e, bias in biases.items()}
    call = _Call(routes, weights, cast, adapters, dropout, as_many)
    factors = [adapter.a for adapter in adapters] + [adapter.bt for adapter in adapters]
    y: Tensor = _ExpertsLinear.apply(  # type: ignore[no-untyped-call]
        x.contiguous(), call, source_of(x), *factors
    )
    return y


class _Call:
    """What a call knows beside the values that it is differentiated in.

    Attributes:
        bounds: of the rows.
        weights: of each expert that has rows.
        columns: where each weight's results lie.
        width: of all results.
        biases: of each of these experts.
        scalings: of the adapters.
        ranks: of each adapter, where it lies among the stacked ranks.
        dropout: the probability, and ``seed``, from torch's own generator.
        as_many: of the forward's sums.
    """

    def __init__(
        self,
        routes: Routes,
        weights: Mapping[int, Sequence[Weight]],
        biases: Mapping[int, Tensor] | None,
        adapters: Sequence[StackedLowRank],
        dropout: float,
        as_many: bool,
    ) -> None:
        self.as_many = as_many
        self.bounds, self.weights, self.biases = routes.bounds, weights, biases
        some = next(iter(weights.values()))
        self.columns, self.width = _slices([weight.shape[0] for weight in some])
        self.inputs = int(some[0].shape[1])
        self.scalings = [adapter.scaling for adapter in adapters]
        self.ranks, self.rank = _slices([adapter.a.shape[1] for adapter in adapters])
        self.dropout = dropout if adapters else 0.0
        self.seed = draw_seed() if self.dropout else 0

    def noise(self, u: Tensor) -> Tensor | None:
        """Return what multiplies ``x`` for the adapters, the same each time; None without dropout."""
        return noise_of(self.seed, self.dropout, u, self.inputs) if self.dropout else None

    def stacked(self, factors_a: Sequence[Tensor]) -> Tensor:
        """Return all A, ``[experts, sum of ranks, in]``."""
        first = factors_a[0]
        if len(factors_a) == 1:
            return first
        return torch.cat(
            list(factors_a), 1, out=pool.empty((len(first), self.rank, self.inputs), first.dtype, first.device)
        )

    def scale(self, u: Tensor) -> None:
        """Multiply ``[rows, sum of ranks]`` by each adapter's s, in place: that is less than all experts' A or B."""
        for r, s in zip(self.ranks, self.scalings, strict=True):
            if s != 1:
                u[:, r] *= s

    def gradient(self, shape: Sequence[int], device: torch.device) -> Tensor:
        """Return fp32 ``[experts, ...]`` from the pool, to be written: zeros where an expert has no rows."""
        made = pool.empty(shape, torch.float32, device)
        for expert in set(range(shape[0])).difference(e for e, _, _ in self.bounds):
            made[expert].zero_()
        return made


class _ExpertsLinear(torch.autograd.Function):
    """``tensors``: all A, all Bᵀ."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, call: _Call, source: Source | None, *tensors: Tensor) -> Tensor:
        factors_a, factors_b = _parted(tensors, len(call.scalings))
        u = x.new_empty(x.shape[0], call.rank)
        if call.rank:
            stacked, dropped = call.stacked(factors_a), _times(x, call.noise(u))
            kernels.matmul_sums([Sum([Term(dropped[i:j], stacked[e])], u[i:j]) for e, i, j in call.bounds])
            call.scale(u)
        y = pool.empty((x.shape[0], call.width), x.dtype, x.device)
        sums = []
        for e, i, j in call.bounds:
            rows = x[i:j]
            low_rank = [(u[i:j, r], b[e]) for r, b in zip(call.ranks, factors_b, strict=True)]
            for weight, c in zip(call.weights[e], call.columns, strict=True):
                terms = [Term(rows, weight), *(Term(part, b[:, c], transposed=False) for part, b in low_rank)]
                bias = None if call.biases is None else call.biases[e][c]
                sums.append(Sum(terms, y[i:j, c], bias, call.as_many))
        kernels.matmul_sums(sums)
        kept = () if not any(ctx.needs_input_grad[3 : 3 + len(factors_a)]) else source.tensors if source else (x,)
        ctx.save_for_backward(u, *tensors, *kept)
        ctx.call, ctx.compute = call, source.compute if source else None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        n = len(call.scalings)
        u, *saved = ctx.saved_tensors
        factors_a, factors_b = _parted(saved[: 2 * n], n)
        kept = saved[2 * n :]
        need_x, need_a, need_b = ctx.needs_input_grad[0], ctx.needs_input_grad[3 : 3 + n], ctx.needs_input_grad[3 + n :]
        dy = dy.contiguous()
        g = u.new_empty(u.shape[0], call.rank)
        if n:
            kernels.matmul_sums(
                [
                    Sum([Term(dy[i:j], b[e])], g[i:j, r])
                    for e, i, j in call.bounds
                    for r, b in zip(call.ranks, factors_b, strict=True)
                ]
            )
            call.scale(g)
        sums = []
        noise = call.noise(u)
        dx = through = da = None
        if need_x:
            dx = pool.empty((u.shape[0], call.inputs), u.dtype, u.device)
            stacked = call.stacked(factors_a) if n else None
            through = None if noise is None else pool.empty(dx.shape, dx.dtype, dx.device)
            for e, i, j in call.bounds:
                terms = [
                    Term(dy[i:j, c], weight, transposed=False)
                    for weight, c in zip(call.weights[e], call.columns, strict=True)
                ]
                if stacked is not None:
                    of_adapters = Term(g[i:j], stacked[e], transposed=False)
                    if through is None:
                        terms.append(of_adapters)
                    else:
                        sums.append(Sum([of_adapters], through[i:j]))
                sums.append(Sum(terms, dx[i:j]))
        if any(need_a):
            x = kept[0] if ctx.compute is None else ctx.compute(*kept)
            x = _times(x, noise)
            da = call.gradient((len(factors_a[0]), call.rank, call.inputs), u.device)
            sums += [Sum([Term(g[i:j].T, x[i:j], transposed=False)], da[e]) for e, i, j in call.bounds]
        dbs: list[Tensor | None] = [None] * n
        for k, (r, b) in enumerate(zip(call.ranks, factors_b, strict=True)):
            if need_b[k]:
                db = call.gradient(b.shape, u.device)
                sums += [Sum([Term(u[i:j, r].T, dy[i:j], transposed=False)], db[e]) for e, i, j in call.bounds]
                dbs[k] = db
        kernels.matmul_sums(sums)
        if dx is not None and through is not None and noise is not None:
            dx += noise.mul_(through)
        das: list[Tensor | None] = [None] * n
        if da is not None:
            das = [
                da[:, r].to(a.dtype) if need else None for r, a, need in zip(call.ranks, factors_a, need_a, strict=True)
            ]
        low_rank = [*das, *(d if d is None else d.to(b.dtype) for d, b in zip(dbs, factors_b, strict=True))]
        return dx, None, None, *low_rank


def _parted(factors: Sequence[Tensor], n: int) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Return all A and all Bᵀ, contiguous; kept for the backward are the views of parameters that they are of.

    Copies lie in the pool, as what :meth:`_Call.stacked` makes of several: in the heap, layer after layer, they would
    leave gaps.
    """
    whole = [
        factor if factor.is_contiguous() else pool.empty(factor.shape, factor.dtype, factor.device).copy_(factor)
        for factor in factors
    ]
    return whole[:n], whole[n:]


def _slices(sizes: Sequence[int]) -> tuple[list[slice], int]:
    """Return where pieces of these sizes lie one after the other, and the sum."""
    slices, first = [], 0
    for size in sizes:
        slices.append(slice(first, first + size))
        first += size
    return slices, first


def _times(x: Tensor, noise: Tensor | None) -> Tensor:
    return x if noise is None else torch.mul(x, noise, out=pool.empty(x.shape, x.dtype, x.device))
