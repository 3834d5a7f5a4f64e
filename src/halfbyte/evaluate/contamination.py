"""Which texts of an evaluation stand in training data already: overlap of n-grams of words, as for GPT-3.

A text overlaps if 13 of its words in a row occur in a training text in the same order, or all of its words where it has
fewer (Brown et al. 2020, arXiv 2005.14165, appendix C: "a 13-gram overlap ..., or that overlap with the whole example
when it is shorter than 13-grams"). n-grams that stand in more than ten different training texts are templates,
instructions and phrases; they count for nothing, as there. Training texts that say the same are one: a question that is
trained on twenty times is no phrase.

Words are those of :mod:`halfbyte.evaluate.words`, so that case, punctuation and blanks do not matter, and Chinese is
compared by its characters. ``covered`` is the share of a text's words that stand in such an n-gram (as in Llama 2's
section A.6, arXiv 2307.09288, there of tokens).

Training texts stream through. What is held is the n-grams of the evaluation; a word that the evaluation does not have
ends a stretch of training text that is looked at.

Left out: texts that say the same in other words or another language.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from halfbyte.evaluate.words import words_of

N = 13
COMMON = 10
"""Different training texts in which an n-gram may stand and still count."""


@dataclass(frozen=True)
class Found:
    """What was found of one text.

    Attributes:
        gram: the first n-gram of it that counts.
        where: the training text that holds it.
        covered: the share of the text's words that stand in such n-grams.
    """

    gram: str
    where: str
    covered: float


@dataclass
class _Gram:
    """In how many different training texts an n-gram stands, and the first of them."""

    texts: int = 0
    where: str = ""


Grams = dict[int, dict[tuple[int, ...], _Gram]]
"""n-grams by their lengths."""


def overlaps(texts: Sequence[str], training: Iterable[tuple[str, str]], n: int = N) -> list[Found | None]:
    """Return of each text what of it stands in ``training``, or None.

    Args:
        texts: of the evaluation.
        training: pairs of where a training text stands and the text.
        n: words in a row.
    """
    numbers: dict[str, int] = {}
    known: Grams = {}
    split = [words_of(text) for text in texts]
    grams: list[list[_Gram]] = []
    for words in split:
        ids = [numbers.setdefault(word, len(numbers)) for word in words]
        length = min(n, len(ids))
        own = known.setdefault(length, {})
        grams.append([own.setdefault(gram, _Gram()) for gram in _grams(ids, length)])
    _count(known, training, numbers)
    return [_found(words, own, n) for words, own in zip(split, grams, strict=True)]


def _grams(ids: Sequence[int], length: int) -> Iterator[tuple[int, ...]]:
    """Yield the n-grams of a text, from its first place on; none of a text without words."""
    return (tuple(ids[place : place + length]) for place in range(len(ids) - length + 1) if length)


def _count(known: Grams, training: Iterable[tuple[str, str]], numbers: dict[str, int]) -> None:
    """Count in how many different training texts each n-gram stands."""
    seen: set[bytes] = set()
    for where, text in training:
        words = words_of(text)
        digest = hashlib.blake2b("\0".join(words).encode(), digest_size=16).digest()
        if digest in seen:
            continue
        seen.add(digest)
        stretches = list(_stretches(words, numbers))
        for length, own in known.items():
            for gram in {gram for stretch in stretches for gram in _grams(stretch, length) if gram in own}:
                own[gram].texts += 1
                own[gram].where = own[gram].where or where


def _stretches(words: Iterable[str], numbers: dict[str, int]) -> Iterator[list[int]]:
    """Yield the longest runs of words that the evaluation has too, as numbers."""
    run: list[int] = []
    for word in words:
        if (number := numbers.get(word)) is not None:
            run.append(number)
        elif run:
            yield run
            run = []
    if run:
        yield run


def _found(words: Sequence[str], grams: Sequence[_Gram], n: int) -> Found | None:
    places = [place for place, gram in enumerate(grams) if 0 < gram.texts <= COMMON]
    if not places:
        return None
    length = min(n, len(words))
    covered = {place + step for place in places for step in range(length)}
    first = places[0]
    return Found(" ".join(words[first : first + length]), grams[first].where, len(covered) / len(words))
