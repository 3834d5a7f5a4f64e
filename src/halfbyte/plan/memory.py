"""What a run holds at the peak of a step, by part.

Peak means here the anonymous memory of the process beyond what it has after its imports, and the pages of the base's
files that stay in memory (``base``, file-backed: clean, shared by processes, dropped by the system before anything is
killed). Paged optimizer state lies in a file too and is told apart, among what is on the disk.

    base        codes N / 2, block constants N / 64 and 4 N / 16384 (NF4, blocks of 64, double quantization); 2 bytes
                for each value of embeddings, head, norms, biases; of untied embeddings the rows that the data has
    adapter     4 bytes a parameter, and 4 of its gradient; the optimizer's state where it is not paged
    kept        what layers keep (:mod:`halfbyte.plan.costs`) in the blocks of the pool (:mod:`halfbyte.kernels.pool`),
                which rounds each large tensor up to an eighth of a power of two; of recomputed layers their inputs
    work        the larger of a layer's backward and the output head, beyond what is kept
    process     what the run takes whatever its size: tokenizer, tables, the trainer's objects, gaps in the heap, and
                what the pool may hold unused

The peak is at the end of the forward or where the last recomputed layer, the nearest to the head, is run again.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from halfbyte.hf.layers.activations import Policy
from halfbyte.kernels import pool
from halfbyte.nn.cross_entropy import ROWS, WIDTH
from halfbyte.optim.adamw import BLOCKSIZE as MOMENT_BLOCK
from halfbyte.optim.adamw import SMALLEST_8BIT
from halfbyte.plan.costs import FLOAT, kept_bytes
from halfbyte.plan.ranks import adapted
from halfbyte.plan.shape import GATES, Layer, Shape

NESTED = 256
"""Block constants that share one of the second level."""
PROCESS = 55 * 2**20
"""Bytes of a run whatever its size."""
UNUSED = 16 * 2**20
"""Bytes of the pool that lie unused at the peak, about; it may have 64 MiB so (:data:`halfbyte.kernels.pool.SLACK`)."""
PER_LAYER = 2**19
"""Bytes of a layer's Python objects, PEFT's modules among them."""
PER_EXPERT = 30 * 2**10
"""Bytes of the objects of each of an expert's matrices."""


@dataclass(frozen=True)
class Base:
    """The bytes of a base model.

    Attributes:
        quantized: codes and block constants, or the dense weights where nothing is quantized.
        dense: embeddings, output head, norms, biases.
        mapped: how many of all these lie in files that are mapped; the others are anonymous memory.
    """

    quantized: int
    dense: int
    mapped: int

    @property
    def all(self) -> int:
        """All bytes."""
        return self.quantized + self.dense

    @property
    def anonymous(self) -> int:
        """Those that no file backs."""
        return self.all - self.mapped


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of a step, by part.

    Attributes:
        base: of the model, as far as it is in memory (``base_resident``); anonymous or mapped.
        base_mapped: of these the ones that a file backs.
        adapter: its parameters.
        gradients: of them.
        state: of the optimizer, where it is not paged.
        kept: activations of layers that keep them.
        inputs: of layers that are recomputed.
        work: of a layer's backward or of the output head.
        process: of the run, whatever its size.
        paged_state: of the optimizer, in a file; not part of the peak.
    """

    base: int
    base_mapped: int
    adapter: int
    gradients: int
    state: int
    kept: int
    inputs: int
    work: int
    process: int
    paged_state: int = 0

    def parts(self) -> dict[str, int]:
        """Return the parts of the peak by their names."""
        names = ("base", "adapter", "gradients", "state", "kept", "inputs", "work", "process")
        return {name: getattr(self, name) for name in names}

    @property
    def peak(self) -> int:
        """Anonymous memory above the imports, and the resident base."""
        return sum(self.parts().values())

    @property
    def anonymous(self) -> int:
        """What of the peak no file backs."""
        return self.peak - self.base_mapped


def base_bytes(
    shape: Shape,
    quant_type: str,
    blocksize: int | str | None,
    double_quant: bool,
    itemsize: int = 2,
    distinct: int | None = None,
) -> tuple[int, int]:
    """Return the bytes of a base's quantized weights and of what stays dense.

    Args:
        shape: of the model.
        quant_type: number format of its linears.
        blocksize: values that share a constant; ``row``: a row of them.
        double_quant: whether constants are quantized too.
        itemsize: bytes of a dense value.
        distinct: different tokens of the data, of which alone untied embeddings are read; None: all.
    """
    quantized = sum(layer_bytes(layer, quant_type, blocksize, double_quant) for layer in shape.layers)
    read = shape.vocabulary if distinct is None else min(distinct, shape.vocabulary)
    embeddings = (shape.vocabulary + (0 if shape.tied else read)) * shape.hidden
    return quantized, itemsize * (embeddings + shape.dense_weights)


def layer_bytes(layer: Layer, quant_type: str, blocksize: int | str | None, double_quant: bool) -> int:
    """Return the bytes of a layer's quantized weights."""
    matrices = [linear.matrices for linear in layer.linears]
    form = quant_type, blocksize, double_quant
    return sum(count * weight_bytes(rows, columns, *form) for count, rows, columns in matrices)


def weight_bytes(rows: int, columns: int, quant_type: str, blocksize: int | str | None, double_quant: bool) -> int:
    """Return the bytes of one weight: codes and constants, as they lie in files and in memory."""
    values = rows * columns
    if quant_type == "none":
        return 2 * values
    blocks = rows if blocksize == "row" else -(-values // int(blocksize or 64))
    if quant_type == "int8":
        return values + FLOAT * blocks
    return -(-values // 2) + (blocks + FLOAT * -(-blocks // NESTED) if double_quant else FLOAT * blocks)


def state_bytes(sizes: Sequence[int], optimizer: str) -> int:
    """Return the bytes of an optimizer's state over tensors of these ``sizes``; of transformers' about."""
    moments = 1 if "lion" in optimizer else 2
    if optimizer in ("sgd", "adafactor"):
        return 0
    if optimizer in ("rmsprop", "adagrad"):
        return FLOAT * sum(sizes)
    if not optimizer.endswith("8bit"):
        return FLOAT * moments * sum(sizes)
    return sum(
        moments * (size * FLOAT if size < SMALLEST_8BIT else size + FLOAT * -(-size // MOMENT_BLOCK)) for size in sizes
    )


def resident_state(sizes: Sequence[int], optimizer: str) -> int:
    """Return what of an optimizer's state is memory: all of it, or nothing where it is paged to a file."""
    return 0 if optimizer.startswith("paged") else state_bytes(sizes, optimizer)


def pooled(count: int) -> int:
    """Return what a tensor of ``count`` bytes takes, in the pool or in the heap where it is small.

    A block of the pool is rounded up to an eighth of a power of two. Its last huge page is in memory whole, since the
    mappings of neighbouring blocks are one to the system.
    """
    if count < pool.SMALLEST:
        return count
    step = 1 << max((count - 1).bit_length() - 4, 12)
    size = -(-count // step) * step
    return -(-size // pool.HUGE_PAGE) * pool.HUGE_PAGE if huge_pages() else size


@functools.cache
def huge_pages() -> bool:
    """Return whether the system gives huge pages to whom asks for them."""
    try:
        return "[never]" not in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return False


def pooled_layer(shape: Shape, layer: Layer, ranks: Mapping[str, int], tokens: int, first: bool, itemsize: int) -> int:
    """Return what a layer keeps for ``tokens`` in all, each of its tensors that lie in the pool rounded as that does.

    The residual stream, ranks and numbers a row are torch's own tensors.
    """
    exact = kept_bytes(shape, layer, ranks, tokens, first, itemsize)
    gates = [x.taken * x.outputs for x in layer.linears if x.name in GATES]
    gates += [shape.hidden] if layer.mixture and layer.mixture.shared_gate else []
    joined = any(x.name == "qkv_proj" for x in layer.linears)
    heads = [shape.queries, shape.queries, shape.keys]
    heads += [shape.queries + 2 * shape.keys] if joined else [shape.keys]
    heads += [shape.queries, shape.keys] if shape.head_norms else []
    norms = [shape.hidden] * {"before": 1, "around": 3, "after": 2}[shape.norms]
    sizes = [tokens * width * itemsize for width in (*norms, *heads, *gates)]
    return exact + sum(pooled(size) - size for size in sizes)


def at_work(shape: Shape, tokens: int, trained: int, itemsize: int, dropout: bool) -> tuple[int, int]:
    """Return what a layer's backward and what the output head take beside what is kept.

    Of a mixture there are rows of the residual stream too, one for each expert of a token: the gradient of what the
    experts read, and that again, from which their adapters' gradients are made.
    """
    widths = shape.inner, shape.hidden, shape.expert_rows
    wide, narrow, of_experts = (pooled(tokens * width * itemsize) for width in widths)
    layer = 3 * wide + 3 * narrow + 2 * of_experts
    if dropout:
        layer += 6 * tokens * max(widths) * itemsize  # draws, noise and products with it
    rows = min(trained, ROWS)
    chunk = rows * (shape.hidden * (2 * FLOAT + 2 * FLOAT + itemsize) + min(WIDTH, shape.vocabulary) * itemsize)
    head = 2 * narrow + 2 * trained * shape.hidden * itemsize + chunk
    return layer, head


def memory_of(
    shape: Shape,
    ranks: Sequence[Mapping[str, int]],
    base: Base,
    policy: Policy,
    tokens: int,
    trained: int,
    optimizer: str,
    dropout: bool = False,
    itemsize: int = 2,
    together: int = 1,
) -> Memory:
    """Return the memory of a step at its peak.

    Args:
        shape: of the model.
        ranks: of LoRA, by layer.
        base: of the model, as far as it is in memory.
        policy: what layers keep.
        tokens: of the largest pass.
        trained: those with a label.
        optimizer: its name.
        dropout: whether LoRA's input loses values.
        itemsize: bytes of a value of the compute dtype.
        together: micro-batches that go through a paged base layer by layer, whose inputs wait together.
    """
    sizes = adapter_sizes(shape, ranks)
    parameters = sum(sizes)
    each = enumerate(shape.layers)
    layers = [pooled_layer(shape, layer, ranks[index], tokens, index == 0, itemsize) for index, layer in each]
    again = policy.offloaded + policy.recomputed
    inputs = together * policy.recomputed * pooled(tokens * shape.hidden * itemsize)
    kept = sum(layers[again:])
    work, head = at_work(shape, tokens, trained, itemsize, dropout)
    end = kept + max(head, work)
    rerun = layers[again - 1] + work if again else 0
    state, resident = state_bytes(sizes, optimizer), resident_state(sizes, optimizer)
    unused = min(UNUSED, (kept + inputs + max(head, work)) // 8)
    return Memory(
        base=base.all,
        base_mapped=base.mapped,
        adapter=FLOAT * parameters,
        gradients=FLOAT * parameters,
        state=resident,
        kept=kept,
        inputs=inputs,
        work=max(end, rerun) - kept,
        process=objects(shape) + unused,
        paged_state=state - resident,
    )


def objects(shape: Shape) -> int:
    """Return what the run takes whatever its work: tokenizer, tables, the trainer's and the layers' objects."""
    of_experts = sum(linear.matrices[0] for layer in shape.layers for linear in layer.experts)
    return PROCESS + PER_LAYER * len(shape.layers) + PER_EXPERT * of_experts


def adapter_sizes(shape: Shape, ranks: Sequence[Mapping[str, int]]) -> list[int]:
    """Return how many values each of LoRA's matrices has, whose ``ranks`` are told by layer."""
    placed = adapted(shape, ranks)
    return [size for x, rank in placed for size in (x.count * rank * x.inputs, x.count * rank * x.outputs)]
