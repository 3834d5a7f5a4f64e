"""What the experiments on quantization read, and what the small models among them are trained on.

Real English out of the descriptions of Debian's packages (:mod:`texts`), and the general text that halfbyte ships.
"""

from collections.abc import Sequence

import texts

from halfbyte.evaluate.texts import general_texts

HELD_OUT = ("games", "math", "science")
"""Sections of Debian whose descriptions nothing here is trained on."""
PIECES, CHARACTERS = 80, 600

Losses = tuple[list[float], list[int]]
"""Nats of each text, and how many tokens they are of."""


def pieces() -> list[str]:
    """Return the texts that every model reads: 80 descriptions, then the passages of the general text."""
    held = [_paragraph(row) for row in texts.synopses() if row.kind in HELD_OUT]
    long = [text for text in held if len(text) >= CHARACTERS * 2 // 3]
    return [_cut(text) for text in [*long[:PIECES], *(passage.text for passage in general_texts())]]


def training_text() -> list[str]:
    """Return what is trained on: the descriptions of all other sections."""
    return [_paragraph(row) for row in texts.synopses() if row.kind not in HELD_OUT]


def _paragraph(row: texts.Row) -> str:
    return row.source.partition(": ")[2]


def _cut(text: str) -> str:
    return text[:CHARACTERS].rpartition(" ")[0] if len(text) > CHARACTERS else text


def perplexity(losses: Sequence[float], tokens: Sequence[int]) -> float:
    """Return e^(Σ nats / Σ tokens)."""
    from math import exp

    return exp(sum(losses) / sum(tokens))
