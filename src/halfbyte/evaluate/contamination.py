"""Which texts of an evaluation stand in training data already: overlap of n-grams of words, as for GPT-3.

A text overlaps if 13 of its words in a row occur in a training text in the same order, or all of its words where it has
fewer (Brown et al. 2020, arXiv 2005.14165, appendix C: "a 13-gram overlap ..., or that overlap with the whole example
when it is shorter than 13-grams"). n-grams that stand in more than ten different training texts are phrases, and count
for nothing, as there. Training texts that say the same are one: what is trained on twenty times is no phrase.

Rows of fine-tuning begin alike, with an instruction, and 13 words may be ten of that and three of anybody's. So words
of a template are none of a text's own: those that stand in five words in a row which more than 5 % of the training
texts have, and more than ten. What they leave is looked for, piece by piece.

Words are those of :mod:`halfbyte.evaluate.words`, so that case, punctuation and blanks do not matter, and Chinese is
compared by its characters. ``covered`` is the share of a text's own words that stand in such an n-gram (as in Llama 2's
section A.6, arXiv 2307.09288, there of tokens).

Training texts stream through, twice. What is held is the n-grams of the evaluation; a word that the evaluation does not
have ends a stretch of training text that is looked at.

Left out: texts that say the same in other words or another language.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from halfbyte.evaluate.words import words_of

N = 13
COMMON = 10
"""Different training texts in which an n-gram may stand and still count."""
TEMPLATE, SHARE = 5, 0.05
"""Words in a row that are a template's, and the share of training texts that must have them."""

Training = Callable[[], Iterable[tuple[str, str]]]
"""Begins to yield pairs of where a training text stands and the text."""


@dataclass(frozen=True)
class Found:
    """What was found of one text.

    Attributes:
        gram: the first n-gram of it that counts.
        where: the training text that holds it.
        covered: the share of the text's own words that stand in such n-grams.
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


def overlaps(texts: Sequence[str], training: Training, n: int = N) -> list[Found | None]:
    """Return of each text what of it stands in the training data, or None.

    Args:
        texts: of the evaluation.
        training: the training data.
        n: words in a row.
    """
    numbers: dict[str, int] = {}
    ids = [[numbers.setdefault(word, len(numbers)) for word in words_of(text)] for text in texts]
    words = list(numbers)
    template: Grams = {TEMPLATE: {gram: _Gram() for own in ids for gram in _grams(own, TEMPLATE)}}
    count = _count(template, training(), numbers)
    least = max(COMMON, SHARE * count)
    common = {gram for gram, found in template[TEMPLATE].items() if found.texts > least}
    known: Grams = {}
    split = [_own(text, common) for text in ids]
    held: list[list[list[_Gram]]] = []
    for pieces in split:
        length = min(n, max(map(len, pieces), default=0))
        own = known.setdefault(length, {})
        held.append([[own.setdefault(gram, _Gram()) for gram in _grams(piece, length)] for piece in pieces])
    _count(known, training(), numbers)
    return [_found(pieces, grams, words, n) for pieces, grams in zip(split, held, strict=True)]


def _grams(ids: Sequence[int], length: int) -> Iterator[tuple[int, ...]]:
    """Yield the n-grams of a text, from its first place on; none of a text without words."""
    return (tuple(ids[place : place + length]) for place in range(len(ids) - length + 1) if length)


def _own(ids: Sequence[int], common: set[tuple[int, ...]]) -> list[list[int]]:
    """Return the pieces of a text that are no template's."""
    taken = {
        place + step for place, gram in enumerate(_grams(ids, TEMPLATE)) if gram in common for step in range(TEMPLATE)
    }
    pieces: list[list[int]] = [[]]
    for place, number in enumerate(ids):
        if place not in taken:
            pieces[-1].append(number)
        elif pieces[-1]:
            pieces.append([])
    return [piece for piece in pieces if piece]


def _count(known: Grams, training: Iterable[tuple[str, str]], numbers: dict[str, int]) -> int:
    """Count in how many different training texts each n-gram stands, and return how many there are."""
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
    return len(seen)


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


def _found(pieces: Sequence[list[int]], held: Sequence[list[_Gram]], words: Sequence[str], n: int) -> Found | None:
    length = min(n, max(map(len, pieces), default=0))
    first: Found | None = None
    covered = 0
    for piece, grams in zip(pieces, held, strict=True):
        places = [place for place, gram in enumerate(grams) if 0 < gram.texts <= COMMON]
        covered += len({place + step for place in places for step in range(length)})
        if places and first is None:
            gram = piece[places[0] : places[0] + length]
            first = Found(" ".join(words[number] for number in gram), grams[places[0]].where, 0.0)
    return first and replace(first, covered=covered / sum(map(len, pieces)))
