"""How near a generated text comes to the one that should have come, or to the nearest of several.

ROUGE-L  F1 of the longest common subsequence of words: 2 L / (m + n), m and n the words of the two
         (Lin 2004, aclanthology.org/W04-1013); words of every script (:mod:`halfbyte.evaluate.words`), without
         rouge_score's stemmer
F1       2 c / (m + n), c the words that the two share in whatever order, each as often as both have it, as SQuAD
         counts them (arXiv 1606.05250), but articles count too: they are words of other languages
exact    whether both are the same but for case, punctuation and blanks, as Super-NaturalInstructions compares
         (arXiv 2204.07705)
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from halfbyte.data.examples import BadRow
from halfbyte.data.prompts import Asked
from halfbyte.evaluate.words import plain, words_of

SEVERAL = ("references", "answers", "targets")
"""Columns that may hold several references: a list of texts, or SQuAD's ``{"text": [...]}``."""


def reference_scores(answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Return the means of ``rouge_l`` and ``exact_match`` over pairs of texts."""
    pairs = list(zip(answers, references, strict=True))
    return {
        "rouge_l": sum(rouge_l(*pair) for pair in pairs) / len(pairs),
        "exact_match": sum(exact_match(*pair) for pair in pairs) / len(pairs),
    }


def best_scores(answer: str, references: Sequence[str]) -> dict[str, float]:
    """Return of each of :data:`METRICS` the best over several references."""
    return {name: float(max(score(answer, one) for one in references)) for name, score in METRICS.items()}


def rouge_l(answer: str, reference: str) -> float:
    """Return ROUGE-L of two texts, 0 to 1; 0 where one has no word."""
    one, other = words_of(answer), words_of(reference)
    if not one or not other:
        return 0.0
    lengths = [0] * (len(other) + 1)  # of the common subsequence up to each word of the other
    for word in one:
        before = 0
        for place, their in enumerate(other, start=1):
            before, lengths[place] = (
                lengths[place],
                before + 1 if word == their else max(lengths[place], lengths[place - 1]),
            )
    return 2 * lengths[-1] / (len(one) + len(other))


def f1(answer: str, reference: str) -> float:
    """Return F1 of the words of two texts, 0 to 1; 0 where one has no word."""
    one, other = words_of(answer), words_of(reference)
    shared = (Counter(one) & Counter(other)).total()
    return 2 * shared / (len(one) + len(other)) if shared else 0.0


def exact_match(answer: str, reference: str) -> bool:
    """Tell whether two texts are the same but for case, punctuation and blanks."""
    return plain(answer) == plain(reference)


METRICS: dict[str, Callable[[str, str], float]] = {"rouge_l": rouge_l, "f1": f1, "exact_match": exact_match}


def references_of(asked: Asked) -> list[str]:
    """Return what a row says that should come: one text or several.

    Raises:
        BadRow: it says nothing, or something that holds no word that could be compared.
    """
    found = [asked.reference] if asked.reference is not None else []
    for name in SEVERAL:
        if name in asked.row and (texts := _texts(asked, name, asked.row[name])):
            found = texts
            break
    if not found:
        raise BadRow(
            asked.where,
            "no reference",
            "says no answer that should come; add one (completion, answer), or several in a column references.",
        )
    if not any(words_of(text) for text in found):
        raise BadRow(
            asked.where,
            "a reference without words",
            f"has the reference {found[0]!r}, in which ROUGE-L and F1 find no letter and no digit of any script; write "
            "it in words, or remove the row.",
        )
    return found


def _texts(asked: Asked, name: str, value: Any) -> list[str]:
    texts = value.get("text") if isinstance(value, Mapping) else value
    if isinstance(texts, str | int | float):
        texts = [texts]
    if not isinstance(texts, list) or not all(isinstance(text, str | int | float) for text in texts):
        raise BadRow(asked.where, f"{name} is no list of texts", f"has {name} that is no list of texts; write one.")
    return [str(text) for text in texts]
