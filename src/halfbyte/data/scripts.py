"""What a table's texts are written in, and what was broken in them before they came here.

A sample of rows is decoded. Scripts are Unicode's (UAX 24), by the characters that belong to one; digits, punctuation
and emoji belong to all. The prompt's share includes the words of the chat template.
"""

import dataclasses
import functools
import re
from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

from halfbyte.choices import IGNORED

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

SAMPLE = 2_000
"""Rows that are decoded."""
TOKENS = 4_096
"""Tokens of each that are decoded at most."""
OF_ALL = ("Zyyy", "Zinh", "Zzzz")
"""Codes of Unicode for what belongs to no script of its own."""

_1252 = "€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ"
MOJIBAKE = re.compile(
    f"[ÂÃ][\u0080-\u00bf{_1252}]"  # UTF-8 read as Windows-1252 or Latin-1: two bytes,
    f"|â[€\u0080][\u0080-\u00bf{_1252}]"  # the punctuation of Windows,
    "|[ÐÑ][\u0080-\u00bf][ÐÑ]|ï»¿|ï¿½"  # Cyrillic, a byte order mark, U+FFFD;
    "|锟斤拷"  # U+FFFD in UTF-8 read as GBK
)
"""What text looks like that was read in another encoding than it was written in. A hint: good text rarely has it."""
REPLACEMENT = "\ufffd"


@dataclasses.dataclass(frozen=True)
class Texts:
    """What was found in a sample of rows.

    Attributes:
        sampled: rows that were decoded.
        main_scripts: names of scripts with the share of the rows whose trained text is mostly in them, falling.
        trained_scripts: the same with shares of the trained characters that have a script.
        prompt_scripts: the same of what is not trained.
        replaced: rows with U+FFFD, the sign for bytes that could not be read.
        mojibake: rows with text that was read in a wrong encoding, by its looks.
    """

    sampled: int
    main_scripts: dict[str, float]
    trained_scripts: dict[str, float]
    prompt_scripts: dict[str, float]
    replaced: int
    mojibake: int


def look_at(rows: "datasets.Dataset", tokenizer: "PreTrainedTokenizerBase", seed: int) -> Texts:
    """Decode a sample of ``rows`` and look at it."""
    count = len(rows)
    numbers = np.arange(count)
    if count > SAMPLE:
        numbers = np.sort(np.random.default_rng(seed).choice(count, SAMPLE, replace=False))
    written: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}
    mostly: Counter[str] = Counter()
    replaced = mojibake = 0
    for number in numbers.tolist():
        row = rows[number]
        ids, labels = np.array(row["input_ids"][:TOKENS], int), np.array(row["labels"][:TOKENS], int)
        # A cut may go through a character, which is then no fault of the data.
        whole = tokenizer.decode(ids, skip_special_tokens=True).rstrip(REPLACEMENT)
        replaced += REPLACEMENT in whole
        mojibake += MOJIBAKE.search(whole) is not None
        for trained in (True, False):
            chosen = ids[(labels != IGNORED) == trained]
            found = scripts(tokenizer.decode(chosen, skip_special_tokens=True))
            written[trained] += found
            if trained and found:
                mostly[max(found, key=lambda name: found[name])] += 1
    return Texts(len(numbers), shares(mostly), shares(written[True]), shares(written[False]), replaced, mojibake)


def scripts(text: str) -> Counter[str]:
    """Count the characters of each script by its name."""
    found: Counter[str] = Counter()
    for character, times in Counter(text).items():
        if name := _script(character):
            found[name] += times
    return found


def shares(counts: Counter[str]) -> dict[str, float]:
    """Return each one's share of all, the largest first."""
    total = counts.total()
    return {name: times / total for name, times in counts.most_common()}


@functools.cache
def _script(character: str) -> str:
    """Return the name of a character's script; empty if it has none of its own."""
    from fontTools import unicodedata

    code = unicodedata.script(character)
    return "" if code in OF_ALL else str(unicodedata.script_name(code)).replace("_", " ")
