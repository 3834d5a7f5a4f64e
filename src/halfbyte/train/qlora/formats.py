"""The data sets of ``qlora.py`` and the texts that it makes of their rows. Imports no torch.

Whatever its format, a row becomes an ``input`` (the source) and an ``output`` (the target); see ``format_dataset`` and
``extract_alpaca_dataset`` there. Of oasst1 and hh-rlhf the source is empty, so that whole conversations are trained,
the user's words too. Names are those that its ``load_data`` takes; where the data lies is in
:mod:`halfbyte.data.catalog`.
"""

from collections.abc import Callable, Mapping
from typing import Any

from halfbyte.data import catalog
from halfbyte.data.readers import is_there
from halfbyte.data.sources import Source, resolve
from halfbyte.errors import InputError, named, nearest
from halfbyte.files import absolute

DATASETS = ("alpaca", "alpaca-clean", "chip2", "self-instruct", "hh-rlhf", "longform", "oasst1")
OWN_COLUMNS = "input-output"

ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response: "
)
ALPACA_NO_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response: "
)
HUMAN, BOT = "<human>: ", "\n<bot>: "

Pair = dict[str, str]
"""``input`` and ``output`` of a row."""


def _alpaca(row: Mapping[str, Any]) -> Pair:
    prompt = ALPACA_INPUT if row.get("input") else ALPACA_NO_INPUT
    return {"input": prompt.format(instruction=row["instruction"], input=row.get("input")), "output": row["output"]}


def _chip2(row: Mapping[str, Any]) -> Pair:
    source, target, *_ = row["text"].split(BOT)
    return {"input": source.replace(HUMAN, ""), "output": target}


FORMATS: dict[str, tuple[tuple[str, ...], Callable[[Mapping[str, Any]], Pair]]] = {
    "alpaca": (("instruction", "output"), _alpaca),
    "alpaca-clean": (("instruction", "output"), _alpaca),
    "chip2": (("text",), _chip2),
    "self-instruct": (
        ("prompt", "completion"),
        lambda row: {"input": row["prompt"], "output": row["completion"]},
    ),
    "hh-rlhf": (("chosen",), lambda row: {"input": "", "output": row["chosen"]}),
    "oasst1": (("text",), lambda row: {"input": "", "output": row["text"]}),
    OWN_COLUMNS: (("input", "output"), lambda row: {"input": row["input"], "output": row["output"]}),
}
"""Name of a format: the columns that it needs, and what it makes of a row."""


def source_of(dataset: str) -> Source:
    """Return where the data lies that ``--dataset`` names.

    Raises:
        InputError: it is none that the script knows, and no file.
    """
    if dataset == "vicuna":
        raise InputError("--dataset vicuna: Vicuna's data was not released, the script refuses it too; name a file.")
    if dataset in DATASETS:
        return Source(**catalog.DATASETS[dataset].source)
    if not is_there(absolute(dataset)):
        raise InputError(
            f"--dataset {dataset}: there is no such file, and no data set of that name{nearest(dataset, DATASETS)}; "
            f"the script knows {named(DATASETS)}."
        )
    [source] = resolve(dataset)
    return source


def format_of(dataset: str, dataset_format: str | None) -> str:
    """Return the format that rows are read in: that of the name, of the data set, else columns input and output.

    Raises:
        InputError: there is no such format.
    """
    if dataset_format is None:
        return dataset if dataset in FORMATS else OWN_COLUMNS
    if dataset_format not in FORMATS:
        raise InputError(
            f"--dataset_format {dataset_format}: there is no such format{nearest(dataset_format, FORMATS)}; there are "
            f"{named(FORMATS)}."
        )
    return dataset_format


def pair_of(where: str, row: Any, format_name: str) -> Pair:
    """Return the source and the target of a row.

    Raises:
        InputError: it lacks a column of the format, or holds something else than text there.
    """
    columns, make = FORMATS[format_name]
    held = list(row) if isinstance(row, Mapping) else []
    missing = [name for name in columns if name not in held]
    if missing:
        fits = [name for name, (needed, _) in FORMATS.items() if needed and set(needed) <= set(held)]
        hint = f"; --dataset_format {fits[0]} would fit" if fits else ""
        raise InputError(
            f"{where} has no column {missing[0]!r}, which --dataset_format {format_name} needs: it has "
            f"{named(held) if held else 'none'}{hint}."
        )
    for name in columns:
        if not isinstance(row[name], str):
            raise InputError(f"{where}: column {name!r} should be text, and is {type(row[name]).__name__}.")
    if format_name == "chip2" and BOT not in row["text"]:
        raise InputError(f"{where}: column 'text' holds no answer ({BOT.strip()!r} at the beginning of a line).")
    return make(row)
