"""Rows for sequence-to-sequence models: which texts are read and written, and how they become tokens."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from halfbyte import hf
from halfbyte.data import BadRow, Completion, DataOptions, prepare
from halfbyte.data.sequences import SequenceRows, as_sequences, sequences_of

# What Tk-Instruct's ni_collator.py writes of a definition and an input, without examples.
TK = "Definition: Say it.\n\nNow complete the following example -\nInput: Is it so.\nOutput: "


def read(row: Any, **options: Any) -> Any:
    [example] = sequences_of([("row 1", row)], **options)
    return as_sequences(example)


@pytest.mark.parametrize(
    ("row", "source", "target"),
    [
        ({"prompt": "a", "completion": "b"}, "a", "b"),
        ({"text": "a", "target": "b", "id": 1}, "a", "b"),
        ({"document": "a", "summary": "b"}, "a", "b"),
        ({"source": "a", "target": "b"}, "a", "b"),
        ({"instruction": "a", "input": "i", "output": "b"}, "a\n\ni", "b"),
        ({"instruction": "a", "input": "", "output": "b"}, "a", "b"),
        ({"question": "a", "answer": "b"}, "a", "b"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "a", "b"),
        ({"definition": "Say it.", "inputs": "Is it so", "targets": "yes", "id": "t"}, TK, "yes"),
        ({"definition": "Say it", "input": "Is it so.", "output": ["yes", "aye"]}, TK, "yes"),
        ({"definition": ["Say it.", "Tell it."], "inputs": "Is it so", "targets": ["yes"]}, TK, "yes"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, None, "no text"),
    ],
)
def test_what_is_read_and_written_of_a_row(row: Any, source: str | None, target: str) -> None:
    found = read(row)
    if source is None:
        assert isinstance(found, BadRow)  # a method makes an answer of a preference before
    else:
        assert isinstance(found, Completion) and (found.prompt, found.completion) == (source, target)


def test_rows_without_one_text_to_write_say_why() -> None:
    turns = [{"role": role, "content": "a"} for role in ("user", "assistant", "user", "assistant")]
    for row, sentence in (
        ({"messages": turns}, "is a conversation with 2 answers, but task seq2seq learns one answer"),
        ({"text": "a", "label": "x"}, "for a text and its label use task classify"),
        ({"text": "a"}, "add a column target"),
    ):
        with pytest.raises(BadRow, match=sentence):
            raise read(row)


def test_own_columns_and_a_template_win() -> None:
    row = {"text": "a", "target": "b", "q": "c"}
    assert read(row, columns={"prompt": "q", "completion": "target"}).prompt == "c"
    assert read(row, columns={"completion": "target"}, template="{q} {text}").prompt == "c a"


def test_sources_are_cut_as_the_tokenizer_cuts_and_targets_lose_their_stop_token(
    task_folder: Callable[[str], Path],
) -> None:
    tokenizer = hf.load_tokenizer(task_folder("t5"))
    examples = [Completion("1", "short", "text"), Completion("2", "a source too long", "a target too long")]
    short, long = SequenceRows(tokenizer, 9).encode(examples)
    assert short.rows[0]["input_ids"].tolist() == tokenizer("short")["input_ids"]
    assert short.rows[0]["labels"].tolist() == tokenizer(text_target="text")["input_ids"]
    assert (
        long.rows[0]["input_ids"].tolist() == tokenizer("a source too long", truncation=True, max_length=9)["input_ids"]
    )
    assert long.rows[0]["labels"].tolist() == tokenizer("a target too long")["input_ids"][:9]
    assert tokenizer.eos_token_id not in long.rows[0]["labels"]
    assert (short.truncated, long.truncated) == (False, True)


def test_the_table_holds_sources_and_targets_of_their_own_lengths(
    task_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [{"text": "long text </s>", "target": "x"}, {"text": "a", "target": "a longer target"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = hf.load_tokenizer(task_folder("t5"))
    data = prepare(DataOptions(model="m", data=str(file), eval_data=str(file), task="seq2seq"), tokenizer)
    assert [len(row["input_ids"]) for row in data.train.rows] == [15, 2]
    assert [len(row["labels"]) for row in data.train.rows] == [2, 16]
    assert (data.train.counts.tokens, data.train.counts.trained_tokens, data.longest) == (17, 18, 16)
    assert data.evaluation and data.evaluation.rows["reference"] == ["x", "a longer target"]
