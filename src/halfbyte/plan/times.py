"""How long a training step takes: the work of each part, times what a piece of it takes on this machine.

A pass of ``T`` tokens, of which ``n`` have a label, through layers of N frozen weights:

    base products     2 N T flop forward, 2 N T for the gradient of the input, 2 N T again where recomputed
    LoRA              2 R T flop forward and 4 R T backward, R being the adapter's values
                      (N and R of a mixture: what a token passes)
    attention         4 P Q flop forward and 10 P Q backward; P pairs of query and key, Q values of a query
    element-wise      values that norms, rotary embedding, gating and residual sums pass
    head              4 n V H flop, and n V logits
    optimizer         by parameter and tensor
    Python            by layer and pass

The first layer's input needs no gradient, so its first projections have none to compute. Where a base does not fit into
memory a step reads it from the disk meanwhile and takes the longer of the two (:func:`disk_seconds`).

Of a mixture each expert's weights are expanded once a pass, however few rows it has, which takes as long as some rows
more would (:data:`EXPANDING`). There is no rate of what Python takes for each expert, or of what chooses them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from halfbyte.hf.layers.activations import Pace
from halfbyte.plan.machine import Rates
from halfbyte.plan.ranks import active_adapter, adapted
from halfbyte.plan.shape import QKV, Shape

EXPANDING = (16, 18)
"""Rows whose products take as long, forward and backward, as expanding a 4-bit weight: what times of Qwen3-30B-A3B's
experts with 64 and with 128 rows each say (benchmarks/README.md, 2026-12-01); rates of dense layers include it."""


@dataclass(frozen=True)
class Pass:
    """The rows of one forward and backward pass, on the average.

    Attributes:
        tokens: that go through the layers, padding included.
        squares: Σ length², of the rows without their padding: twice the pairs that causal attention works on.
        trained: tokens with a label.
        longest: tokens of a row.
    """

    tokens: float
    squares: float
    trained: float
    longest: int


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimizer step, by part; ``disk`` is what waits for the disk beyond all that is computed."""

    base: float
    recomputed: float
    lora: float
    attention: float
    element_wise: float
    head: float
    optimizer: float
    python: float
    disk: float = 0.0

    @property
    def seconds(self) -> float:
        """Of the whole step."""
        return float(sum(vars(self).values()))


def pace_of(rates: Rates, weights: int, tokens: int, pageable: int) -> Pace:
    """Return how long products with a base take, and reading it: what decides whether it is paged.

    Args:
        rates: of the machine.
        weights: of the layers' linears, those that a token passes.
        tokens: of a pass.
        pageable: bytes of the base that lie in files.
    """
    return Pace(rates.forward[0] * 2 * tokens * weights, pageable / rates.disk)


def step_time(
    rates: Rates,
    shape: Shape,
    ranks: Sequence[Mapping[str, int]],
    work: Pass,
    passes: float = 1.0,
    recomputed: int = 0,
    dropout: bool = False,
    backward: bool = True,
    parameters: int = 0,
    tensors: int = 0,
) -> StepTime:
    """Return the time of a step.

    Args:
        rates: of the machine.
        shape: of the model.
        ranks: of LoRA, by layer.
        work: of a pass.
        passes: of a step.
        recomputed: how many layers, the first ones, run forward again.
        dropout: whether LoRA's input loses values.
        backward: False for an evaluation: forward alone.
        parameters: that are trained.
        tensors: of them.
    """
    tokens, layers = work.tokens, len(shape.layers)
    again = layers if not backward else layers + recomputed
    rows = sum(layer.values for layer in shape.layers)
    passed, dx_passed = (tokens * shape.active_weights + more * _expanded(shape, tokens) for more in EXPANDING)
    forward = rates.forward[0] * 2 * passed + rates.forward[1] * tokens * rows
    spared = sum(linear.weights for linear in shape.layers[0].linears if linear.name in QKV)
    dx = rates.backward[0] * 2 * (dx_passed - tokens * spared) + rates.backward[1] * tokens * rows
    low_rank = 2 * tokens * active_adapter(shape, ranks)
    touched = tokens * sum(linear.values for linear, _ in adapted(shape, ranks))
    lora_forward = rates.lora_forward[0] * low_rank + rates.lora_forward[1] * touched
    lora_backward = rates.lora_backward[0] * 2 * low_rank + rates.lora_backward[1] * touched
    elements = _element_wise(rates, shape, tokens)
    heads = _attention(rates, shape, work)
    times = {
        "base": forward + (dx if backward else 0),
        "recomputed": (again - layers) * (forward / layers + elements[0] / layers + rates.layer[0])
        + recomputed / layers * heads[0] * backward,
        "lora": lora_forward * again / layers + lora_backward * backward,
        "attention": heads[0] + (heads[1] if backward else 0),
        "element_wise": elements[0] + (elements[1] if backward else 0),
        "head": _head(rates, shape, work.trained) * (1 if backward else 0.5),
        "optimizer": 0.0,
        "python": layers * (rates.layer[0] + (rates.layer[1] if backward else 0)),
    }
    if dropout:
        read = sum(group[0].taken * group[0].inputs for layer in shape.layers for group in layer.groups)
        times["lora"] += rates.dropout * tokens * read
    times = {name: passes * seconds for name, seconds in times.items()}
    if backward:
        times["optimizer"] = rates.optimizer[0] * parameters + rates.optimizer[1] * tensors
        times["python"] += rates.step
    return StepTime(**times)


def disk_seconds(base: int, resident: int, rate: float) -> float:
    """Return what reading the base takes in a step, where ``resident`` of its bytes stay in memory.

    Forward and backward go through it once each, whatever the rows: ``2 (base - resident) / rate``.
    """
    return 2 * max(base - resident, 0) / rate


def _expanded(shape: Shape, tokens: float) -> float:
    """Return how many values of experts' weights a pass reads, if its tokens choose experts evenly."""
    experts = [linear for layer in shape.layers for linear in layer.experts]
    return float(sum(x.weights * (1 - (1 - x.taken / x.count) ** tokens) for x in experts))


def _attention(rates: Rates, shape: Shape, work: Pass) -> tuple[float, float]:
    """Return the seconds of attention in all layers, forward and backward."""
    near = min(rates.attention, key=lambda size: abs(size - shape.head_dim))
    forward_flop, backward_flop, value = rates.attention[near]
    forward = backward = 0.0
    for layer in shape.layers:
        pairs, window = work.squares / 2, layer.window
        if window is not None and window < work.longest:
            rows = work.squares / work.longest**2  # of full length
            pairs = rows * window * (work.longest - window / 2)
        forward += forward_flop * 4 * pairs * shape.queries + value * work.tokens * shape.queries
        backward += backward_flop * 10 * pairs * shape.queries + 2 * value * work.tokens * shape.queries
    return forward, backward


def _element_wise(rates: Rates, shape: Shape, tokens: float) -> tuple[float, float]:
    """Return the seconds of norms, rotation, gating and residual sums in all layers, forward and backward."""
    norms = {"before": 2, "around": 4, "after": 2}[shape.norms] * shape.hidden
    if shape.head_norms:
        norms += shape.queries + shape.keys
    sums = shape.hidden * (1 if shape.norms == "before" else 2)
    layers, inner = len(shape.layers), sum(layer.inner for layer in shape.layers)
    # rows of experts: taken, weighed, summed; about what an addition takes
    of_experts = sum(mixture.taken * (2 * shape.hidden + mixture.inner) for mixture in shape.mixtures)
    parts = (
        (rates.norm, layers * norms), (rates.gated, inner), (rates.rotary, layers * (shape.queries + shape.keys)),
        (rates.addition, layers * sums + of_experts),
    )  # fmt: skip
    forward, backward = (sum(rate[way] * width for rate, width in parts) for way in (0, 1))
    backward += rates.norm[0] * layers * norms / 2 + rates.gated[0] * inner  # made again for LoRA's gradients
    return forward * tokens, backward * tokens


def _head(rates: Rates, shape: Shape, trained: float) -> float:
    return trained * shape.vocabulary * (4 * shape.hidden * rates.head[0] + rates.head[1])
