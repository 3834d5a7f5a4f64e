"""What others have published about QLoRA's memory on GPUs, and the tables of the paper and of tutorials, beside ours.

Each check point says who, what was run and what it took; :func:`residuals` says how far the formula of
:mod:`halfbyte.plan.gpus` is off. Where a table disagrees, the reason stands beside it, as far as it is known.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from transformers import LlamaConfig

from halfbyte.plan.gpus import CONTEXT, GB, KEEPING, OFFLOADING, OURS, STOCK, Stack, full_bytes, gpu_parts
from halfbyte.plan.shape import Shape, shape_of

GIB = 2**30
# hidden, inner, layers, heads, heads of keys, vocabulary, tied
LLAMAS: dict[str, tuple[int, int, int, int, int, int, bool]] = {
    "1B": (2048, 8192, 16, 32, 8, 128_256, True),
    "7B": (4096, 11_008, 32, 32, 32, 32_000, False),
    "8B": (4096, 14_336, 32, 32, 8, 128_256, False),
    "13B": (5120, 13_824, 40, 40, 40, 32_000, False),
    "33B": (6656, 17_920, 60, 52, 52, 32_000, False),
    "34B": (8192, 22_016, 48, 64, 8, 32_000, False),
    "65B": (8192, 22_016, 80, 64, 64, 32_000, False),
    "70B": (8192, 28_672, 80, 64, 8, 32_000, False),
    "70B, Llama 3": (8192, 28_672, 80, 64, 8, 128_256, False),
}
ATTENTION = ("q_proj", "v_proj")


@cache
def llama(name: str) -> Shape:
    """Return the shape of a Llama of :data:`LLAMAS`."""
    hidden, inner, layers, heads, kv_heads, vocabulary, tied = LLAMAS[name]
    return shape_of(
        LlamaConfig(
            hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
            num_key_value_heads=kv_heads, vocab_size=vocabulary, tie_word_embeddings=tied,
        )
    )  # fmt: skip


def everywhere(shape: Shape, rank: int, names: Sequence[str] = ()) -> list[dict[str, int]]:
    """Return LoRA of one rank on every linear layer, or on those of these names."""
    layers = [layer.linears for layer in shape.layers]
    return [{x.path: rank for x in linears if not names or x.name in names} for linears in layers]


@dataclass(frozen=True)
class CheckPoint:
    """What somebody measured, or says that a card holds.

    Attributes:
        who: and with what.
        model: of :data:`LLAMAS`.
        tokens: of a pass.
        rank: of LoRA.
        stack: the way of training, as it is understood here.
        published: bytes.
        names: the layers with LoRA; empty: all.
        note: what is assumed, or why it is off.
    """

    who: str
    model: str
    tokens: int
    rank: int
    stack: Stack
    published: float
    names: tuple[str, ...] = ()
    note: str = ""

    @property
    def foretold(self) -> float:
        """Bytes by our formula."""
        shape = llama(self.model)
        return sum(gpu_parts(shape, everywhere(shape, self.rank, self.names), self.tokens, self.stack).values())


_LONGEST = "the longest context that the card is said to hold"
_LITGPT = "2 rows of 512 tokens and LoRA on two projections are assumed"
CHECK_POINTS = (
    *(
        CheckPoint("HF and FlashAttention 2, 8B", "8B", tokens, 32, STOCK, gb * GB, note=_LONGEST)
        for gb, tokens in ((12, 932), (16, 2551), (24, 5789), (40, 12_264), (80, 28_454))
    ),
    CheckPoint("HF and FlashAttention 2, 70B", "70B, Llama 3", 6916, 32, STOCK, 80 * GB, note=_LONGEST),
    *(
        CheckPoint("Unsloth, 8B", "8B", tokens, 32, OFFLOADING, gb * GB, note=_LONGEST)
        for gb, tokens in ((8, 2972), (24, 78_475), (80, 342_733))
    ),
    CheckPoint("Unsloth, 70B", "70B, Llama 3", 12_106, 32, OFFLOADING, 48 * GB, note=_LONGEST),
    CheckPoint("litgpt on A10G, 8B", "8B", 1024, 8, KEEPING, 17.41 * GB, ATTENTION, _LITGPT),
    CheckPoint("litgpt on A10G, 7B", "7B", 1024, 8, KEEPING, 13.68 * GB, ATTENTION, _LITGPT),
    CheckPoint("litgpt on A10G, 1B", "1B", 1024, 8, KEEPING, 5.53 * GB, ATTENTION, _LITGPT),
    CheckPoint("litgpt on A100, 7B", "7B", 1024, 8, KEEPING, 13.84 * GB, ATTENTION, _LITGPT),
    CheckPoint("litgpt on A100, 13B", "13B", 1024, 8, KEEPING, 22.55 * GB, ATTENTION, _LITGPT),
    CheckPoint(
        "torchtune on RTX 4090, 8B", "8B", 4096, 8, OURS, 7.4 * GIB + CONTEXT, ATTENTION,
        "torch's own count, to which CUDA's context is added here",
    ),
    CheckPoint("the paper: 33B on 24 GB", "33B", 512, 64, OURS, 24 * GB, note="what the card holds, optimizer paged"),
    CheckPoint("the paper: 65B on 48 GB", "65B", 512, 64, OURS, 48 * GB, note="what the card holds, optimizer paged"),
)  # fmt: skip


def residuals() -> list[tuple[CheckPoint, float]]:
    """Return of each check point how far the formula is off, as a share of what was published."""
    return [(point, point.foretold / point.published - 1) for point in CHECK_POINTS]


@dataclass(frozen=True)
class Said:
    """A row of somebody's table, GB: training all of a model, LoRA over 16 bits, QLoRA; None where it says nothing."""

    where: str
    model: str
    full: float | None
    lora: float | None
    qlora: float | None


TABLES = (
    Said("tutorial", "7B", 60, 16, 6),
    Said("tutorial", "13B", 104, 28, 10),
    Said("tutorial", "34B", 272, 75, 20),
    Said("tutorial", "70B", 560, 160, 48),
    Said("another tutorial", "7B", 112, 24, 6),
    Said("the paper", "65B", 780, None, 48),
    Said("the paper", "33B", None, None, 24),
)
TOKENS, RANK = 512, 16
CARD_TABLE = {8: "7B, tight", 16: "7B to 13B", 24: "13B to 34B", 48: "34B to 70B", 80: "70B and more"}
"""A tutorial's table: GB of a card, and the largest models for QLoRA on it."""


def ours(model: str, rank: int = RANK, tokens: int = TOKENS) -> tuple[float, float, float]:
    """Return our GB for training all of a model (16 bytes a parameter, without activations), LoRA and QLoRA."""
    shape = llama(model)
    ranks = everywhere(shape, rank)
    lora, qlora = (sum(gpu_parts(shape, ranks, tokens, OURS, kind).values()) / GB for kind in ("none", "nf4"))
    return full_bytes(shape) / GB, lora, qlora


def fitting(gigabytes: float, rank: int = RANK, tokens: int = TOKENS) -> list[str]:
    """Return the models of :data:`LLAMAS` whose QLoRA fits a card of so many GB."""
    return [name for name in LLAMAS if "Llama" not in name and ours(name, rank, tokens)[2] <= gigabytes]
