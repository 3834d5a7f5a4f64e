"""The rows of ``qlora.py``: its split, its truncation, its labels.

    source = bos + input, the first source_max_len tokens
    target = output + eos, the first target_max_len tokens
    ids    = source + target;  labels = target, and with train_on_source the source too

Source and target are tokenized apart, as texts in which control tokens are read as such, and nothing is added to
either. A tokenizer without bos adds none; the script wrote the word "None" there.

A local file loses a tenth of its rows, drawn with the seed: the script sets them aside as a split that it never reads
(``local_dataset``). With ``do_eval`` or ``do_predict``, ``eval_dataset_size`` rows of the others are held out, drawn
with seed 42. Both draws are those of ``datasets``' ``train_test_split``, so the same rows are trained as there.
"""

import dataclasses
import itertools
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from halfbyte.choices import IGNORED
from halfbyte.data.bad_rows import BadRows
from halfbyte.data.examples import Example
from halfbyte.data.prepared import Prepared
from halfbyte.data.sources import read_source
from halfbyte.data.table import Table, Tokenized, open_table
from halfbyte.data.tokens import Encoded, Row
from halfbyte.errors import InputError
from halfbyte.train.qlora.flags import Flags
from halfbyte.train.qlora.formats import Pair, format_of, pair_of, source_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LOCAL_SHARE = 0.1
"""Of a local file's rows, what the script sets aside."""
EVAL_SEED = 42
TOGETHER = 1000
"""Rows that are tokenized in one call."""


@dataclasses.dataclass(frozen=True)
class Placed:
    """A row as source and target, and where it stands."""

    where: str
    pair: Pair


@dataclasses.dataclass(frozen=True)
class Rows:
    """What is trained and what is held out.

    Attributes:
        train: None unless ``do_train``.
        held_out: for evaluation and prediction.
        said: what was found out, a sentence each.
    """

    train: list[Placed]
    held_out: list[Placed]
    said: list[str]


def read(flags: Flags, progress: Callable[[int, int, int], None] | None = None) -> Rows:
    """Read and split the data that the flags name.

    Raises:
        InputError: it cannot be read, a row is not of the format, or nothing is left to train on.
    """
    source = source_of(flags["dataset"])
    form = format_of(flags["dataset"], flags["dataset_format"])
    said: list[str] = []
    rows = [Placed(where, pair_of(where, row, form)) for where, row in read_source(source, progress, said=said)]
    if not source.is_hub:
        train, aside = split(len(rows), LOCAL_SHARE, flags["seed"], "a tenth of which the script sets aside")
        said.append(f"As in qlora.py, {len(aside):,} of the file's {len(rows):,} rows are set aside and not read again")
        rows = [rows[number] for number in train]
    held_out: list[Placed] = []
    if flags["do_eval"] or flags["do_predict"]:
        size = flags["eval_dataset_size"]
        train, out = split(len(rows), size, EVAL_SEED, f"and eval_dataset_size is {size}")
        held_out = [rows[number] for number in out[: flags["max_eval_samples"]]]
        rows = [rows[number] for number in train]
    return Rows(rows[: flags["max_train_samples"]] if flags["do_train"] else [], held_out, said)


def split(count: int, size: float, seed: int, reason: str) -> tuple[list[int], list[int]]:
    """Return the numbers of the rows that ``train_test_split`` keeps and of those that it takes out, in its order."""
    import datasets

    numbers = datasets.Dataset.from_dict({"row": range(count)})
    try:
        parts = numbers.train_test_split(test_size=size, shuffle=True, seed=seed)
    except ValueError as error:
        raise InputError(f"There are {count:,} rows, {reason}: that leaves nothing; take more rows or a smaller "
                         "eval_dataset_size.") from error  # fmt: skip
    return list(parts["train"]["row"]), list(parts["test"]["row"])


def tokenize(rows: Iterable[Placed], tokenizer: "PreTrainedTokenizerBase", flags: Flags) -> Iterator[Encoded]:
    """Yield each row as ids and labels, int32 ``[L]``."""
    waiting = iter(rows)
    while chunk := list(itertools.islice(waiting, TOGETHER)):
        sources = source_ids([row.pair for row in chunk], tokenizer, flags["source_max_len"])
        texts = [f"{row.pair['output']}{tokenizer.eos_token or ''}" for row in chunk]
        targets = _ids(texts, tokenizer, flags["target_max_len"])
        for row, (source, cut), (target, cut_too) in zip(chunk, sources, targets, strict=True):
            labels = source if flags["train_on_source"] else [IGNORED] * len(source)
            ids = np.array(source + target, np.int32)
            encoded: Row = {"input_ids": ids, "labels": np.array(labels + target, np.int32)}
            yield Encoded(Example(row.where), [encoded], cut or cut_too)


def source_ids(
    pairs: Iterable[Pair], tokenizer: "PreTrainedTokenizerBase", longest: int
) -> list[tuple[list[int], bool]]:
    """Return the ids of each source, and whether it was cut."""
    return _ids([f"{tokenizer.bos_token or ''}{pair['input']}" for pair in pairs], tokenizer, longest)


def _ids(texts: list[str], tokenizer: Any, longest: int) -> list[tuple[list[int], bool]]:
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [(ids[:longest], len(ids) > longest) for ids in encoded]


def prepare(rows: Rows, tokenizer: "PreTrainedTokenizerBase", flags: Flags) -> Prepared:
    """Return the rows as tables of tokens; where nothing is trained, those for evaluation stand in both places."""
    evaluation = _table(rows.held_out, tokenizer, flags) if rows.held_out else None
    train = _table(rows.train, tokenizer, flags) if rows.train else evaluation
    assert train is not None  # something is trained, evaluated or predicted
    return Prepared(train, evaluation if flags["do_eval"] else None, BadRows(), None, {}, rows.said)


def _table(rows: Iterable[Placed], tokenizer: Any, flags: Flags) -> Tokenized:
    temporary = Path(tempfile.mkdtemp(prefix="halfbyte-rows-"))
    with Table(temporary) as table:
        for encoded in tokenize(rows, tokenizer, flags):
            table.add(encoded)
    return open_table(temporary, temporary=temporary)


def equip(tokenizer: "PreTrainedTokenizerBase", config: Any, name: str) -> list[str]:
    """Give a tokenizer the control tokens that the script gives it, and return sentences that say so.

    Of Llama's models, whose early tokenizers lack them, bos and eos are those that the model's configuration numbers
    (the script sets unk too, to the pad token; no row here holds it). A pad token is not added where there is none:
    padding is masked, whatever it holds.

    Args:
        tokenizer: of the model; is changed.
        config: the model's.
        name: of the model, as it was given.

    Raises:
        InputError: there is no eos token to end a target with.
    """
    said = []
    if "llama" in name.lower() or "Llama" in type(tokenizer).__name__:
        for token in ("eos_token", "bos_token"):
            number = getattr(config, f"{token}_id", None)
            number = number[0] if isinstance(number, list) else number
            if number is not None and getattr(tokenizer, f"{token}_id") != number:
                setattr(tokenizer, token, tokenizer.convert_ids_to_tokens(number))
                said.append(
                    f"The tokenizer's {token} is {getattr(tokenizer, token)}, as the model's configuration has it"
                )
    if tokenizer.eos_token is None:
        raise InputError(
            f"{name}: its tokenizer has no eos token, which qlora.py ends targets with; choose another model."
        )
    if tokenizer.bos_token is None:
        said.append("The tokenizer has no bos token, so sources begin without one (the script writes the word None)")
    return said
