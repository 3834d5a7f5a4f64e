"""What qlora.py makes of its data, written down plainly: the formula that our rows are held to.

    pair      of a row, by its format: what is read and what is to be written
    split     a tenth of a local file is set aside; of the rest, so many rows are held out under the seed 42
    ids       of bos + source, cut to ``source_max_len``, and then of target + eos, cut to ``target_max_len``
    labels    the target's ids; the source's too with ``train_on_source``, else -100

Random numbers are those of ``datasets``, which draws from numpy's generator, seeded before anything is read.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
from transformers import set_seed

from halfbyte.train.qlora.flags import Flags
from halfbyte.train.qlora.formats import ALPACA_INPUT, ALPACA_NO_INPUT

Row = dict[str, Any]


def _alpaca(row: Row) -> tuple[str, str]:
    return (ALPACA_INPUT if row.get("input") else ALPACA_NO_INPUT).format(**row), row["output"]


def _chip2(row: Row) -> tuple[str, str]:
    asked, answer = row["text"].split("\n<bot>: ")[:2]
    return asked.replace("<human>: ", ""), answer


PAIRS: dict[str, Callable[[Row], tuple[str, str]]] = {
    "alpaca": _alpaca,
    "chip2": _chip2,
    "self-instruct": lambda row: (row["prompt"], row["completion"]),
    "hh-rlhf": lambda row: ("", row["chosen"]),
    "oasst1": lambda row: ("", row["text"]),
    "input-output": lambda row: (row["input"], row["output"]),
}


def parts(flags: Flags, form: str) -> tuple[list[Row], list[Row]]:
    """Return the pairs to train on and those that are held out, as ``input`` and ``output``."""
    set_seed(flags["seed"])
    file = Path(flags["dataset"])
    if file.suffix in (".json", ".jsonl"):
        rows = datasets.Dataset.from_json(str(file))
    else:
        rows = datasets.Dataset.from_pandas(pd.read_csv(file, delimiter="\t" if file.suffix == ".tsv" else ","))
    train, held_out = rows.train_test_split(test_size=0.1)["train"], None
    if flags["do_eval"] or flags["do_predict"]:
        split = train.train_test_split(test_size=flags["eval_dataset_size"], shuffle=True, seed=42)
        train, held_out = split["train"], split["test"]
    taken = []
    for part, most in ((train, flags["max_train_samples"]), (held_out, flags["max_eval_samples"])):
        pairs = [dict(zip(("input", "output"), PAIRS[form](row), strict=True)) for row in part or ()]
        taken.append(pairs[:most])
    return taken[0], taken[1]


def source(row: Row, tokenizer: Any, flags: Flags) -> list[int]:
    """Return the ids of what is read."""
    ids: list[int] = tokenizer(tokenizer.bos_token + row["input"], add_special_tokens=False)["input_ids"]
    return ids[: flags["source_max_len"]]


def ids_and_labels(row: Row, tokenizer: Any, flags: Flags) -> tuple[list[int], list[int]]:
    """Return the ids of a row and its labels."""
    before = source(row, tokenizer, flags)
    after = tokenizer(row["output"] + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
    after = after[: flags["target_max_len"]]
    return before + after, (before if flags["train_on_source"] else [-100] * len(before)) + after
