"""GPUs by name, from their makers' sheets, and what QLoRA would take on one: an estimate, never measured here.

    memory = base in 4 bits + embeddings and head + adapter with gradient and moments + CUDA's context
             + tokens (inputs of recomputed layers + logits of a stock loss) + one layer at work

Stacks differ in three things, which :class:`Stack` names: in what embeddings and head are held, whether the loss takes
whole logits, and where the inputs of recomputed layers lie. :mod:`halfbyte.plan.published` holds the formula against
what others have published. Sizes of cards are in GB (10⁹ bytes) as their sheets have them.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from halfbyte.errors import InputError, nearest
from halfbyte.plan.memory import base_bytes
from halfbyte.plan.ranks import adapter_parameters
from halfbyte.plan.shape import Shape
from halfbyte.plan.times import Pass

GB = 10**9
CONTEXT = 0.8e9
"""Bytes of CUDA's context and its libraries' workspaces."""
STOCK_LOGITS = 18
"""Bytes a logit of a stock loss: bf16, fp32, its softmax, its gradient, and a copy in between."""
REACHED = 0.5
"""Of the sheet's arithmetic, what training reaches. One published time says 0.68 (torchtune, RTX 4090)."""


@dataclass(frozen=True)
class Card:
    """A GPU.

    Attributes:
        name: as people say it.
        memory: GB.
        tflops: dense bf16, of T4 and V100 fp16.
        bandwidth: GB/s.
        confirmed: whether the arithmetic is from the maker's own sheet; of GeForce cards it is not.
    """

    name: str
    memory: float
    tflops: float
    bandwidth: float
    confirmed: bool = True


CARDS = (
    Card("T4", 16, 65, 320),
    Card("V100 16GB", 16, 125, 900),
    Card("V100 32GB", 32, 125, 900),
    Card("A10", 24, 125, 600),
    Card("L4", 24, 121, 300),
    Card("L40S", 48, 362, 864),
    Card("A100 40GB", 40, 312, 1555),
    Card("A100 80GB", 80, 312, 2039),
    Card("H100 PCIe", 80, 756, 2000),
    Card("H100 SXM", 80, 989, 3350),
    Card("H200", 141, 989, 4800),
    Card("RTX 3060", 12, 26, 360, False),
    Card("RTX 3090", 24, 71, 936, False),
    Card("RTX 4060 Ti 8GB", 8, 44, 288, False),
    Card("RTX 4060 Ti 16GB", 16, 44, 288, False),
    Card("RTX 4090", 24, 165, 1008, False),
    Card("RTX 5090", 32, 209, 1792, False),
)
DESCRIBED = re.compile(r"(\d+(?:\.\d+)?)\s*GB\s*,\s*(\d+(?:\.\d+)?)\s*TFLOPS\s*(?:,\s*(\d+(?:\.\d+)?)\s*GB/s)?", re.I)
HOW = "24GB,165TFLOPS,1008GB/s"


@dataclass(frozen=True)
class Stack:
    """A way of training.

    Attributes:
        dense: bytes of a value of embeddings and head.
        logits: bytes of a logit and token; 0 for a loss in chunks.
        inputs_here: whether the inputs of recomputed layers lie on the card.
        recomputes: whether layers are recomputed at all.
        trained: bytes that come with a trained parameter.
    """

    dense: int = 2
    logits: int = 0
    inputs_here: bool = True
    recomputes: bool = True
    trained: int = 10


OURS = Stack()
"""halfbyte on a GPU with everything recomputed; adapters and gradients in fp32, moments in 8 bits."""
STOCK = Stack(dense=4, logits=STOCK_LOGITS)
"""transformers and peft after ``prepare_model_for_kbit_training``, with gradient checkpointing."""
OFFLOADING = Stack(inputs_here=False)
"""Unsloth: inputs of layers wait in the machine's memory."""
KEEPING = Stack(logits=STOCK_LOGITS, recomputes=False)
"""litgpt without checkpointing."""


def card_named(text: str) -> Card:
    """Return the card of that name, or the one that it describes.

    Args:
        text: such as ``RTX 4090``, ``a100 80gb``, or ``24GB,165TFLOPS,1008GB/s``.

    Raises:
        InputError: it is neither; told with the nearest, and with how to describe one.
    """
    if found := DESCRIBED.fullmatch(text.strip()):
        return Card(text.strip(), float(found[1]), float(found[2]), float(found[3] or 0), False)
    known = {_plain(card.name): card for card in CARDS}
    wanted = _plain(text)
    if wanted in known:
        return known[wanted]
    partly = [card for name, card in known.items() if wanted and wanted in name]
    if len(partly) == 1:
        return partly[0]
    if partly:
        names = " or ".join(card.name for card in partly)
        raise InputError(f"There are several cards {text!r}: say {names}.")
    near = nearest(text.upper(), [card.name for card in CARDS])
    raise InputError(
        f"There is no card {text!r} in the table{near}, which has {', '.join(card.name for card in CARDS)}; describe "
        f"another by its sheet, as {HOW}."
    )


def gpu_parts(
    shape: Shape, ranks: Sequence[Mapping[str, int]], tokens: float, stack: Stack = OURS, quant_type: str = "nf4"
) -> dict[str, float]:
    """Return the bytes of QLoRA on a GPU, by part.

    Args:
        shape: of the model.
        ranks: of LoRA, by layer.
        tokens: of a pass.
        stack: the way of training.
        quant_type: number format of the base; ``none`` is LoRA over 16 bits.
    """
    quantized, dense = base_bytes(shape, quant_type, 64, quant_type == "nf4")
    parameters = adapter_parameters(shape, [dict(layer) for layer in ranks])
    width = shape.hidden + shape.queries + shape.keys
    rows = 4 * shape.expert_rows  # what experts read, and its gradient
    one = 2 * (2 * width + 2 * shape.inner) + 2 * (3 * shape.inner + 3 * shape.hidden) + rows
    if not stack.recomputes:
        stock = 2 * (10 * shape.hidden + 3 * shape.queries + 4 * shape.keys) + rows
        held = float(sum(stock + 8 * layer.inner for layer in shape.layers))
    else:
        held = 2.0 * len(shape.layers) * shape.hidden if stack.inputs_here else 0.0
    return {
        "base": float(quantized),
        "embeddings and head": dense * stack.dense / 2,
        "adapter": float(stack.trained * parameters),
        "context": CONTEXT,
        "activations": tokens * held,
        "logits": float(tokens * shape.vocabulary * stack.logits),
        "a layer at work": float(tokens * one) if stack.recomputes else 0.0,
    }


def longest_on(card_bytes: float, shape: Shape, ranks: Sequence[Mapping[str, int]], stack: Stack = OURS) -> int:
    """Return the tokens of a pass that fit into so many bytes; 0: not even the model does."""
    none, one = (sum(gpu_parts(shape, ranks, tokens, stack).values()) for tokens in (0, 1))
    return max(int((card_bytes - none) / (one - none)), 0)


def gpu_seconds(card: Card, shape: Shape, parameters: int, work: Pass, passes: float = 1.0) -> float:
    """Return the seconds of a step with everything recomputed: arithmetic at :data:`REACHED` of the sheet's, or the
    reading of the base three times, whichever is longer; ``parameters`` are those of LoRA that a token passes."""
    flop = 6 * work.tokens * shape.active_weights + 8 * work.tokens * parameters
    flop += 4 * work.trained * shape.vocabulary * shape.hidden
    flop += 18 * work.squares / 2 * shape.queries * len(shape.layers)
    seconds = flop / (REACHED * card.tflops * 1e12)
    if card.bandwidth:
        seconds = max(seconds, 3 * base_bytes(shape, "nf4", 64, True)[0] / (card.bandwidth * 1e9))
    return passes * seconds


def full_bytes(shape: Shape, per_parameter: int = 16) -> float:
    """Return the bytes of training all of a model: in 16 bits with fp32 copies and AdamW's moments, 16 a parameter."""
    return float(per_parameter * shape.parameters)


def _plain(text: str) -> str:
    plain = re.sub(r"[\s\-_]|nvidia|geforce|tesla", "", text.lower())
    return plain
