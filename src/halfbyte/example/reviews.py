"""The quick start's task: a chat question about a movie review's snippet, answered with one word.

The ratings' file has a line for each snippet: number, mean rating from −4 (negative) to 4 (positive), text, with tabs
between them. Snippets that people found neither way (|rating| ≤ 0.5) are left out, which leaves 4,982 positive and
5,061 negative ones, less two that occur twice.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path

from halfbyte import InputError
from halfbyte.files import write_text

QUESTION = "Is this snippet of a movie review positive or negative? Answer with one word.\n\n"
CLEAR = 0.5


@dataclass(frozen=True)
class Snippet:
    """A few words of a review; ``answer`` is "positive" or "negative"."""

    text: str
    answer: str

    @property
    def question(self) -> str:
        return QUESTION + self.text


def read_snippets(file: Path) -> list[Snippet]:
    """Read the snippets with a clear rating, each text once.

    Raises:
        InputError: a line does not hold a number, a rating and a text.
    """
    snippets: dict[str, Snippet] = {}
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                _, rating, text = line.strip().split("\t", 2)
                mean = float(rating)
            except ValueError:
                raise InputError(f"{file}, line {number}: expected a number, a rating and a text.") from None
            if abs(mean) > CLEAR:
                snippets.setdefault(text, Snippet(text, "positive" if mean > 0 else "negative"))
    return list(snippets.values())


def split(snippets: list[Snippet], train: int, held_out: int, seed: int) -> tuple[list[Snippet], list[Snippet]]:
    """Draw ``train`` snippets to train on and ``held_out`` others to measure with, the same for the same seed."""
    drawn = random.Random(seed).sample(snippets, held_out + train)
    return drawn[held_out:], drawn[:held_out]


def write_chats(snippets: list[Snippet], file: Path) -> Path:
    """Write each snippet's question and answer as a conversation, one JSON line each; return ``file``."""
    lines = []
    for snippet in snippets:
        question = {"role": "user", "content": snippet.question}
        answer = {"role": "assistant", "content": snippet.answer}
        lines.append(json.dumps({"messages": [question, answer]}, ensure_ascii=False) + "\n")
    write_text(file, "".join(lines))
    return file
