"""What the decoding benchmark asks of every side, and the floor under each.

A side is asked for the seconds of one :class:`Work`; what comes before it (a prompt that is held) does not count.

No step takes less time than its bytes at the speed of memory, nor than its products at the peak of arithmetic:

    bytes of a step of R rows    layers + head + adapters in use + Σ over rows of keys and values of its positions
    flop of a step               2 R (values of the layers + values of the head) + 4 Σ positions × heads × size × layers
    flop of a prompt of T        2 T (values of the layers) + 2 (values of the head) + 2 T² × heads × size × layers

Weights count as the side holds them in memory, once a step; embeddings are a row and do not count.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

TURN = 32
"""Tokens of a second turn."""
Kind = Literal["decode", "prompt", "turn", "again"]


@dataclass(frozen=True)
class Work:
    """A piece of work.

    Attributes:
        kind: ``decode``: rows go on by ``tokens`` each; ``prompt``: a text is read up to its first answer token;
            ``turn``: the same behind ``context`` tokens that are held; ``again``: those are read again with it.
        rows: texts that are decoded together.
        context: tokens of each that are held.
        tokens: that are decoded in each row, or read.
        adapters: different ones over the rows; 0 is the base alone.
    """

    kind: Kind
    rows: int
    context: int
    tokens: int
    adapters: int = 0

    @property
    def name(self) -> str:
        """In words."""
        if self.kind == "decode":
            with_ = {0: "", 1: ", one adapter"}.get(self.adapters, f", {self.adapters} adapters")
            return f"decode, {self.rows} row{'s' if self.rows > 1 else ''}{with_}"
        if self.kind == "prompt":
            return f"prompt of {self.tokens}"
        behind = f"{self.tokens} tokens after {self.context:,}"
        return f"first token, {behind}, {'held' if self.kind == 'turn' else 'read again'}"

    @property
    def counted(self) -> int:
        """The tokens that the time is for."""
        return self.rows * self.tokens + (self.context if self.kind == "again" else 0)


class Sizes(NamedTuple):
    """A model as a side holds it.

    Attributes:
        layer_bytes, head_bytes: of weights with their constants.
        adapter_bytes: of one adapter.
        token_bytes: keys and values of one position.
        layer_values, head_values: weights.
        attention: heads × size × layers, of queries.
    """

    layer_bytes: int
    head_bytes: int
    adapter_bytes: int
    token_bytes: int
    layer_values: int
    head_values: int
    attention: int


def step_bytes(work: Work, sizes: Sizes) -> int:
    """Return the bytes that one step of a ``decode`` reads, on average over its tokens; or that a reading does."""
    weights = sizes.layer_bytes + sizes.head_bytes + work.adapters * sizes.adapter_bytes
    if work.kind == "decode":
        return weights + int(work.rows * sizes.token_bytes * _positions(work))
    return weights + (sizes.token_bytes * work.context if work.kind == "turn" else 0)


def work_flop(work: Work, sizes: Sizes) -> int:
    """Return the floating-point operations of the whole work."""
    if work.kind == "decode":
        row = 2 * (sizes.layer_values + sizes.head_values) + 4 * sizes.attention * _positions(work)
        return int(work.tokens * work.rows * row)
    held = work.context if work.kind == "turn" else 0
    read = work.counted
    attended = read * held + read * (read + 1) // 2
    return 2 * read * sizes.layer_values + 2 * sizes.head_values + 4 * sizes.attention * attended


def floor(work: Work, sizes: Sizes, bandwidth: float, peak: float) -> float:
    """Return the seconds that ``work`` takes at least, at ``bandwidth`` bytes/s and ``peak`` flop/s."""
    steps = work.tokens if work.kind == "decode" else 1
    return max(steps * step_bytes(work, sizes) / bandwidth, work_flop(work, sizes) / peak)


def _positions(work: Work) -> float:
    """Return how many positions a decoded token attends to on average, its own among them."""
    return work.context + 1 + (work.tokens + 1) / 2


def works(
    rows: list[int], *, prompt: int, history: int, context: int, tokens: int, adapters: int
) -> list[tuple[Work, bool]]:
    """Return what is measured, and of each whether it is with adapters, which halfbyte alone does.

    Args:
        rows: numbers of conversations.
        prompt: tokens of a prompt that is read.
        history: tokens that a second turn comes after; 0 leaves it out.
        context: tokens of each conversation that is decoded.
        tokens: that are decoded.
        adapters: rows that have one each; 0 leaves them out.
    """
    found = [(Work("decode", count, context, tokens), False) for count in rows]
    found.append((Work("prompt", 1, 0, prompt), False))
    if history:
        found += [(Work(kind, 1, history, TURN), False) for kind in ("again", "turn")]
    if adapters:
        found += [(Work("decode", adapters, context, tokens, count), True) for count in (1, adapters)]
    return found
