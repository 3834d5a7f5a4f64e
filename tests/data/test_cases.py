"""Files as people have them, the whole way: what of each is trained, and what is said of it."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from transformers import AutoTokenizer

from halfbyte.data import DataOptions, Prepared, decode_trained, prepare
from halfbyte.errors import InputError

CASES = Path(__file__).parent / "cases"
END = "<|im_end|>"


@pytest.fixture(scope="module")
def tokenizer(tiny_model_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model_folder)


def run(tokenizer: Any, file: Path, **options: Any) -> Prepared:
    return prepare(DataOptions(**{"model": "m", "data": str(file), "max_length": 1000} | options), tokenizer)


def trained(tokenizer: Any, prepared: Prepared) -> list[str]:
    return [text for row in prepared.train.rows for text in decode_trained(tokenizer, row)]


@pytest.mark.parametrize(
    ("name", "answers"),
    [
        ("03-semicolons.csv", ["Hi."]),
        ("04-tabs.csv", ["Hi."]),
        ("05-caps-header.csv", ["Hi."]),
        ("07-utf16.csv", ["Grüß Gott"]),
        ("08-windows-1252.csv", ["Ça va – bien"]),
        ("09-sharegpt.jsonl", ["Hi.", "Hi again."]),
        ("10-conversations-roles.jsonl", ["Hi."]),
        ("11-question-answer.jsonl", ["Four."]),
        ("12-prompt-as-turns.jsonl", ["Hi."]),
        ("13-content-parts.jsonl", ["Hi."]),
        ("15-developer-role.jsonl", ["Hi."]),
        ("16-array.jsonl", ["Hi.", "Hi."]),
        ("17-pretty-objects.jsonl", ["Hi.", "Hi."]),
        ("18-columns.json", ["c", "d"]),
        ("20-mixed-shapes.jsonl", ["Hi.", " text.", "b"]),
        ("23-control-character.jsonl", ["c"]),
        ("24-two-system-turns.jsonl", ["c", "d"]),
    ],
)
def test_files_that_people_have_train_their_answers(tokenizer: Any, name: str, answers: list[str]) -> None:
    assert trained(tokenizer, run(tokenizer, CASES / name)) == [answer + END for answer in answers]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("03-semicolons.csv", "';'"),
        ("04-tabs.csv", "tab"),
        ("07-utf16.csv", "UTF-16"),
        ("08-windows-1252.csv", "1252"),
        ("20-mixed-shapes.jsonl", "Shapes of the rows"),
        ("21-null-and-number.jsonl", "number"),
    ],
)
def test_what_was_found_is_said(tokenizer: Any, name: str, words: str) -> None:
    assert words in "\n".join(run(tokenizer, CASES / name, skip_bad_rows="all").told())


def test_plain_files_say_nothing_of_themselves(tokenizer: Any) -> None:
    assert len(run(tokenizer, CASES / "11-question-answer.jsonl").told()) == 1  # the counts


@pytest.mark.parametrize(("ending", "how"), [(".gz", "gzip"), (".zst", "zstd")])
def test_compressed_files_are_read_as_what_they_hold(tokenizer: Any, tmp_path: Path, ending: str, how: str) -> None:
    source = tmp_path / "03-semicolons.csv"
    shutil.copy(CASES / source.name, source)
    if how == "gzip":
        subprocess.run([sys.executable, "-m", "gzip", str(source)], check=True)
    else:
        packed = pa.Codec("zstd").compress(source.read_bytes(), asbytes=True)
        source.with_name(source.name + ending).write_bytes(packed)
    assert trained(tokenizer, run(tokenizer, source.with_name(source.name + ending))) == ["Hi." + END]


def test_a_torn_last_line_is_told_and_skipped_only_where_that_is_allowed(tokenizer: Any) -> None:
    file = CASES / "19-truncated-last-line.jsonl"
    with pytest.raises(InputError, match="line 3"):
        run(tokenizer, file)
    assert trained(tokenizer, run(tokenizer, file, skip_bad_rows="all")) == ["Hi." + END] * 2


def test_numbers_become_text_and_answers_that_are_null_are_bad_rows(tokenizer: Any) -> None:
    file = CASES / "21-null-and-number.jsonl"
    with pytest.raises(InputError, match="1 of 4 rows cannot be trained on; mend it") as told:
        run(tokenizer, file)
    assert "row 3" in str(told.value) and "output" in str(told.value)
    assert trained(tokenizer, run(tokenizer, file, skip_bad_rows="all")) == [text + END for text in ("Hi.", "4", "z")]


def test_control_tokens_in_a_users_text_are_text_unless_asked_for(tokenizer: Any) -> None:
    file, end = CASES / "22-special-token-in-text.jsonl", tokenizer.convert_tokens_to_ids(END)
    [row] = run(tokenizer, file).train.rows
    assert row["input_ids"].count(end) == 2 and row["labels"].count(end) == 1
    assert tokenizer.decode(row["input_ids"]) == tokenizer.apply_chat_template(
        [
            {"role": "user", "content": f"What does {END} mean?"},
            {"role": "assistant", "content": f"{END} ends a turn."},
        ],
        tokenize=False,
    ).removesuffix("\n")
    [row] = run(tokenizer, file, parse_special_tokens=True).train.rows
    assert row["input_ids"].count(end) == 4
    for asked in (False, True):
        assert any("control token" in line for line in run(tokenizer, file, parse_special_tokens=asked).told())


def test_tool_calls_need_a_template_that_can_write_them(tokenizer: Any) -> None:
    with pytest.raises(InputError, match="tool"):
        run(tokenizer, CASES / "14-tool-calls.jsonl")


def test_a_field_has_no_limit(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("instruction,output\nSay hi.," + "word " * 40_000 + "\n")
    prepared = run(tokenizer, tmp_path / "a.csv")
    assert prepared.train.counts.truncated == 1 and trained(tokenizer, prepared)[0].startswith("word word")


def test_whatever_json_throws_is_one_sentence_with_the_line(tokenizer: Any, tmp_path: Path) -> None:
    deep = '{"text": ' + "[" * 100_000 + "]" * 100_000 + "}"
    for line in (deep, '{"prompt": "a", "completion": ' + "9" * 5000 + "}", '{"text": "a', '{"text"', "}"):
        (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
        with pytest.raises(InputError, match="line 2"):
            run(tokenizer, tmp_path / "a.jsonl")
