"""Local files in each format of qlora.py."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROWS: dict[str, Callable[[int], dict[str, Any]]] = {
    "alpaca": lambda i: {"instruction": f"Say {i}.", "input": "" if i % 3 else f"with {i}", "output": f"It is {i}."},
    "chip2": lambda i: {"text": f"<human>: What is {i}?\n<bot>: A number, {i}.", "metadata": "x"},
    "self-instruct": lambda i: {"prompt": f"Task {i}: ", "completion": f" done {i}" * (i % 4 + 1)},
    "hh-rlhf": lambda i: {"chosen": f"\n\nHuman: {i}?\n\nAssistant: Yes.", "rejected": "No."},
    "oasst1": lambda i: {"text": f"### Human: hey {i}### Assistant: ho"},
    "input-output": lambda i: {"input": f"q{i} " * (i % 5), "output": f"a{i}", "other": i},
}


@pytest.fixture
def local_file(tmp_path: Path) -> Callable[..., Path]:
    """Makes a file of rows of a format."""

    def write(form: str, count: int = 40, name: str = "rows.jsonl") -> Path:
        file, rows = tmp_path / name, [ROWS[form](i) for i in range(count)]
        if file.suffix == ".jsonl":
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
            return file
        with file.open("w", newline="") as stream:
            table = csv.DictWriter(stream, list(rows[0]), delimiter="," if file.suffix == ".csv" else "\t")
            table.writeheader()
            table.writerows(rows)
        return file

    return write
