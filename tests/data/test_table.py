"""The mapped table: against the rows one by one, and what it takes of memory."""

import gc
import json
import os
import pickle
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import AutoTokenizer

from halfbyte import tables
from halfbyte.choices import IGNORED
from halfbyte.data import BadRow, Chat, Completion, Example, Text, encode_examples, table, tokenize
from halfbyte.errors import InputError


@pytest.fixture(scope="module")
def tokenizer(tiny_model_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model_folder)


def examples(count: int) -> Iterator[Example]:
    """Chats, completions and texts of many lengths; every fifth has a column that is not used."""
    draw = random.Random(0)
    for n in range(count):
        text, unused = "ab é" * draw.randrange(1, 9), ("id",) if n % 5 == 0 else ()
        turns = [{"role": "user", "content": text}, {"role": "assistant", "content": f"{n}"}]
        yield [Chat(f"row {n}", turns, unused=unused), Completion(f"row {n}", text, "b", unused=unused),
               Text(f"row {n}", text, unused=unused)][n % 3]  # fmt: skip


def test_the_table_holds_the_rows_of_all_examples_and_counts_them(tokenizer: Any) -> None:
    rows, truncated = [], 0
    for encoded in encode_examples(examples(500), tokenizer, 60):
        truncated += encoded.truncated
        for row in encoded.rows:
            rows.append({name: ids.tolist() for name, ids in row.items()} | {"where": encoded.example.where})
    made = tokenize(examples(500), tokenizer, 60)
    assert list(made.rows) == rows
    assert 0 < truncated < 500
    lengths = [len(row["labels"]) for row in rows]
    labels = [label for row in rows for label in row["labels"]]
    counts = made.counts
    assert (counts.examples, counts.truncated, counts.rows) == (500, truncated, len(rows))
    assert (counts.tokens, counts.longest) == (sum(lengths), max(lengths))
    assert counts.trained_tokens == len(labels) - labels.count(IGNORED)
    assert counts.largest_id == max(max(row["input_ids"]) for row in rows)
    assert counts.unused == {"id": 100}
    assert tables.lengths(made.rows).tolist() == lengths
    plain = datasets.Dataset.from_list(rows).cast(made.rows.features)
    assert counts.digest == tables.digest(made.rows) == tables.digest(plain)


def test_the_digest_does_not_know_the_batches(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    one = tokenize(examples(300), tokenizer, 60)
    monkeypatch.setattr(table, "BATCH", 64)
    other = tokenize(examples(300), tokenizer, 60)
    assert one.counts.digest == other.counts.digest and list(one.rows) == list(other.rows)


def test_the_digest_knows_every_id_every_label_and_the_order(tokenizer: Any) -> None:
    def digest(*texts: Example) -> str:
        return tokenize(texts, tokenizer, 60).counts.digest

    a, b = Text("row 1", "ab"), Text("row 2", "cd")
    digests = {
        digest(a, b),
        digest(b, a),
        digest(a),
        digest(a, b, b),
        digest(a, Text("", "ce")),
        digest(Text("", "abcd")),
        digest(Chat("", [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd"}])),
    }
    assert len(digests) == 7
    assert digest(a, b) == digest(Text("moved, row 7", "ab"), b)


def test_a_temporary_table_is_gone_with_its_last_user(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    made = tokenize(examples(30), tokenizer, 60)
    rows = made.rows.shuffle(seed=0).with_format("numpy")
    expected = made.rows.with_format(None).to_list()
    del made
    gc.collect()
    assert list(tmp_path.rglob("rows.arrow"))
    assert pickle.loads(pickle.dumps(rows)).to_list() == rows.to_list()  # noqa: S301 as a data loader's workers do
    assert sorted(row["where"] for row in rows) == sorted(row["where"] for row in expected)
    del rows
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_a_temporary_table_outlives_the_workers_that_read_it(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    made = tokenize(examples(3), tokenizer, 60)
    worker = os.fork()
    if not worker:
        del made
        gc.collect()
        os._exit(0)
    assert os.waitpid(worker, 0)[1] == 0
    assert list(tmp_path.rglob("rows.arrow")) and len(list(made.rows)) == 3


def test_nothing_is_left_of_a_table_that_could_not_be_made(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(InputError, match=r"1 of 2,001 rows cannot be trained on(.|\n)*row 2001"):
        tokenize([*examples(2000), BadRow("row 2001", "of a kind", "is bad.")], tokenizer, 60)
    with pytest.raises(ZeroDivisionError):
        tokenize((1 // 0 for _ in range(1)), tokenizer, 60)
    assert not list(tmp_path.iterdir())


def test_no_examples_make_an_empty_table(tokenizer: Any) -> None:
    made = tokenize([], tokenizer, 60)
    assert (len(made.rows), made.counts) == (0, table.Counts(digest=made.counts.digest))


def test_names_of_unused_columns_have_an_end(tokenizer: Any) -> None:
    texts = (Text("", "a", unused=(f"{n}", "kept")) for n in range(2000))
    assert len(tokenize(texts, tokenizer, 60).counts.unused) == table.NAMES


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's count of anonymous memory")
def test_a_hundred_thousand_rows_take_less_memory_than_their_text(tiny_model_folder: Path, tmp_path: Path) -> None:
    """In a process of its own, as the heap of this one has room from before."""
    file = tmp_path / "rows.jsonl"
    line = json.dumps({"prompt": "x" * 300, "completion": "y" * 10}) + "\n"
    file.write_text(line * 100_000)
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, threading, datasets\n"
        "from transformers import AutoTokenizer\n"
        "from halfbyte import data, tables\n"
        "from halfbyte.hf.trainers.sampler import EpochSampler\n"
        "def anonymous():\n"
        "    status = open('/proc/self/status').read()\n"
        "    return int(status.partition('RssAnon:')[2].split()[0]) * 1024\n"
        "def watch():\n"
        "    while not done.wait(0.01): peak.append(max(anonymous(), peak.pop()))\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "tokenizer('warm')\n"
        "before, done = anonymous(), threading.Event()\n"
        "peak = [before]\n"
        "watcher = threading.Thread(target=watch); watcher.start()\n"
        "rows = data.tokenize(data.read_examples(sys.argv[2]), tokenizer, 512)\n"
        "order = iter(EpochSampler(tables.lengths(rows.rows), 16, 0))\n"
        "tables.digest(rows.rows)\n"
        "done.set(); watcher.join()\n"
        "print(len(rows.rows), peak[0] - before)\n"
    )
    command = [sys.executable, str(script), str(tiny_model_folder), str(file)]
    rows, taken = map(int, subprocess.check_output(command, text=True).split())
    assert rows == 100_000
    assert taken < 250e6  # ids and labels are 260 MB, as lists of Python's integers some 600
