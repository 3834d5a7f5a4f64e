"""How near a generated text comes to the one that should have come.

ROUGE-L  F1 of the longest common subsequence of words: 2 L / (m + n), m and n the words of the two
         (Lin 2004, aclanthology.org/W04-1013); words are runs of letters and digits, without rouge_score's stemmer, and
         of every script, where rouge_score has those of ASCII alone
exact    whether both are the same but for case, punctuation and blanks, as Super-NaturalInstructions compares
         (arXiv 2204.07705)
"""

import re
import string
from collections.abc import Sequence

_WORD = re.compile(r"[^\W_]+")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def reference_scores(answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Return the means of ``rouge_l`` and ``exact_match`` over pairs of texts."""
    pairs = list(zip(answers, references, strict=True))
    return {
        "rouge_l": sum(rouge_l(*pair) for pair in pairs) / len(pairs),
        "exact_match": sum(exact_match(*pair) for pair in pairs) / len(pairs),
    }


def rouge_l(answer: str, reference: str) -> float:
    """Return ROUGE-L of two texts, 0 to 1; 0 where one has no word."""
    one, other = _WORD.findall(answer.lower()), _WORD.findall(reference.lower())
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


def exact_match(answer: str, reference: str) -> bool:
    """Tell whether two texts are the same but for case, punctuation and blanks."""
    return _normal(answer) == _normal(reference)


def _normal(text: str) -> str:
    return " ".join(text.lower().translate(_PUNCTUATION).split())
