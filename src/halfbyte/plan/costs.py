"""What a decoder layer keeps between its passes, by a formula: what each operation of a fused layer saves.

A layer of ``T`` tokens keeps (bytes; ``s`` is the compute dtype's, 2 in bf16; in the order of the layer):

    norm            its argument, T H s, and one number a row, 4 T             (halfbyte.nn.norm)
    projections     u, T s for each rank; what they read is a norm's argument   (halfbyte.nn.lora)
    head norms      queries and keys before them, and a number for each head
    rotary          cosines and sines, 2 s for each value of a head that is turned
    attention       queries, keys, values, its result, T s (2 Q + 2 K); its log-sum-exp, 4 for each head and token;
                    ranges, 8 T                                                 (halfbyte.nn.attention)
    gated           gate and up, 2 T I s; what the last projection reads is made of them again
    mixture         gate, up and u of the k experts that a token passes, as above; of each token the probabilities of
                    all E, 4 E, which it passes and where their rows lie, 16 k, what they count, k s, and 4 (k + 1)
                    where that is divided by its sum; what the expert of all tokens gives and how much that counts,
                    (H + 1) s (Qwen2-MoE); 4 E H whatever T where the router works in fp32 (GLM-4)
                                                                                (halfbyte.nn.experts)

Norms around attention and MLP (Gemma) keep their results' arguments too; norms behind them (OLMo 2) leave projections
that read the residual stream itself. The first layer's first norm runs without autograd: nothing before it is trained.

:func:`halfbyte.hf.layers.activations.measure` counts the same on a loaded model; tests hold one to the other, byte for
byte. Neither counts what the rows of a mixture are found by beside autograd's own values, 8 (2 k + 1) a token.
"""

from collections.abc import Mapping, Sequence

from halfbyte.hf.layers.activations import Costs
from halfbyte.plan.shape import GATES, QKV, Layer, Linear, Mixture, Shape

FLOAT = 4
"""Bytes of a value of fp32."""
INDEX = 8
"""Bytes of an index."""


def layer_costs(
    shape: Shape, ranks: Sequence[Mapping[str, int]], length: int, batch: int, itemsize: int = 2, dropout: bool = False
) -> list[Costs]:
    """Return what each layer holds, first to last, as :func:`halfbyte.hf.layers.activations.measure` would find.

    Args:
        shape: of the model.
        ranks: of each layer, the rank of LoRA on each of its linears, by path; those that are not named have none.
        length: tokens of a sequence.
        batch: sequences.
        itemsize: bytes of a value of the compute dtype.
        dropout: whether LoRA's input loses values, for which each operation draws a seed.
    """
    return [
        Costs(
            batch * kept_bytes(shape, layer, ranks[index], length, index == 0, itemsize),
            batch * length * shape.hidden * itemsize,
            sum(any(x.path in ranks[index] for x in group) for group in layer.groups) if dropout else 0,
        )
        for index, layer in enumerate(shape.layers)
    ]


def kept_bytes(
    shape: Shape, layer: Layer, ranks: Mapping[str, int], length: int, first: bool, itemsize: int = 2
) -> int:
    """Return what one layer keeps of one sequence of ``length`` tokens; arguments as for :func:`layer_costs`.

    Args:
        shape: of the model.
        layer: one of its layers.
        ranks: of that layer.
        length: tokens.
        first: whether nothing before the layer is trained.
        itemsize: bytes of a value.
    """
    wide = length * itemsize
    hidden = wide * shape.hidden
    taken = {linear.path: linear.taken for linear in layer.linears}
    kept = wide * sum(taken[path] * rank for path, rank in ranks.items())
    kept += _norms(shape, layer, ranks, length, first, hidden)
    kept += _heads(shape, layer, length, itemsize)
    kept += 2 * wide * layer.inner
    return kept + (_choices(layer.mixture, shape.hidden, length, itemsize) if layer.mixture else 0)


def _norms(shape: Shape, layer: Layer, ranks: Mapping[str, int], length: int, first: bool, hidden: int) -> int:
    """What norms and residual sums keep, and what projections read of them."""
    adapted = {name for name, rank in ranks.items() if rank}
    row = FLOAT * length  # one number a row
    reads = [any(_is(linear, names) and linear.path in adapted for linear in layer.linears) for names in (QKV, GATES)]
    if shape.plain_norms:  # torch's, of fp32 values, with mean and deviation; their results are kept to be read
        once = FLOAT * length * shape.hidden + 2 * row
        return (0 if first else once) + once + sum(hidden for read in reads if read)
    if shape.norms == "after":
        return 2 * (hidden + row) + sum(hidden for read in reads if read)
    norms = 4 if shape.norms == "around" else 2
    spared = row + (0 if reads[0] else hidden) if first else 0
    return norms * (hidden + row) - spared


def _heads(shape: Shape, layer: Layer, length: int, itemsize: int) -> int:
    """What rotation and attention keep."""
    wide = length * itemsize
    values = wide * shape.keys
    if any(linear.name == "qkv_proj" for linear in layer.linears):  # one result, of which the values are a part
        values = wide * (shape.queries + 2 * shape.keys)
    kept = wide * (2 * shape.queries + shape.keys) + values + FLOAT * length * shape.heads + 2 * FLOAT * length
    if layer.rotated:
        kept += 2 * length * shape.turned * (shape.angle_bytes or itemsize)
    if shape.head_norms:
        numbers = shape.heads + shape.kv_heads if shape.head_norms == "head" else 2
        kept += wide * (shape.queries + shape.keys) + FLOAT * length * numbers
    return kept


def _choices(mixture: Mixture, hidden: int, length: int, itemsize: int) -> int:
    """What a mixture keeps beside what its experts do."""
    token = FLOAT * mixture.experts + (2 * INDEX + itemsize) * mixture.taken
    if mixture.normalized:
        token += FLOAT * (mixture.taken + 1)
    if mixture.shared_gate:
        token += itemsize * (hidden + 1)
    return length * token + (FLOAT * mixture.experts * hidden if mixture.fp32 else 0)


def _is(linear: Linear, names: Sequence[str]) -> bool:
    return linear.name in names
