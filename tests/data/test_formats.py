import csv
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfbyte.data import Chat, Completion, Text, read_examples
from halfbyte.errors import InputError

TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize(
    ("row", "example"),
    [
        ({"messages": TURNS, "text": "ignored"}, Chat("", TURNS)),
        ({"instruction": "Hi", "output": "Hello", "text": "ignored"}, Chat("", TURNS)),
        ({"instruction": "Hi", "input": "", "output": "Hello"}, Chat("", TURNS)),
        ({"instruction": "Hi", "input": None, "output": "Hello"}, Chat("", TURNS)),
        (
            {"instruction": "Add", "input": "1 2", "output": "3"},
            Chat("", [{"role": "user", "content": "Add\n\n1 2"}, {"role": "assistant", "content": "3"}]),
        ),
        ({"prompt": "a ", "completion": "b", "id": 7}, Completion("", "a ", "b")),
        ({"text": "once\n"}, Text("", "once\n")),
    ],
)
def test_each_shape_of_row_becomes_its_example(tmp_path: Path, row: dict, example: object) -> None:
    [read] = read_examples(write(tmp_path, "d.jsonl", json.dumps(row)))
    assert read == type(example)(read.where, *list(vars(example).values())[1:])


@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=5))
def test_every_kind_of_file_gives_back_the_rows_written_to_it(
    tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[str, str]]
) -> None:
    folder = tmp_path_factory.mktemp("kinds")
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]
    lines = "\r\n\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    with (folder / "rows.csv").open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, ["prompt", "completion"], quoting=csv.QUOTE_ALL)
        writer.writeheader()
        writer.writerows(rows)
    for path in (
        write(folder, "rows.jsonl", "\ufeff" + lines),
        write(folder, "rows.ndjson", lines),
        write(folder, "array.json", json.dumps(rows, indent=1)),
        write(folder, "data.json", json.dumps({"data": rows, "tags": []})),
        write(folder, "one-list.json", json.dumps({"version": 1, "train": rows})),
        write(folder, "lines.JSON" if len(rows) > 1 else "lines.JSONL", lines),
        folder / "rows.csv",
    ):
        assert [(example.prompt, example.completion) for example in read_examples(path)] == pairs, path


def test_an_example_knows_its_row_and_line(tmp_path: Path) -> None:
    lines = write(tmp_path, "d.jsonl", '{"text": "a"}\n\n{"text": "b"}\n')
    table = write(tmp_path, "d.csv", 'text,n\n"a\nb",1\n\nc,2\n')
    array = write(tmp_path, "d.json", '[{"text": "a"}, {"text": "b"}]')
    assert [example.where for example in read_examples(lines)] == [
        f"{lines}, row 1 (line 1)",
        f"{lines}, row 2 (line 3)",
    ]
    assert [example.where for example in read_examples(table)] == [
        f"{table}, row 1 (line 2)",
        f"{table}, row 2 (line 5)",
    ]
    assert [example.where for example in read_examples(array)] == [f"{array}, row 1", f"{array}, row 2"]


def chat(*turns: object) -> str:
    return json.dumps({"messages": list(turns)})


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("d.jsonl", "", ["holds no rows"]),
        ("d.jsonl", "\n  \n", ["holds no rows"]),
        ("d.json", " ", ["holds no rows"]),
        ("d.json", "[]", ["holds no rows"]),
        ("d.json", '{"tags": ["a"], "data": []}', ["holds no rows"]),
        ("d.csv", "", ["holds no rows"]),
        ("d.csv", "text\n", ["holds no rows"]),
        ("d.txt", "hello", ["d.txt", ".jsonl, .ndjson, .json or .csv"]),
        ("d.jsonl", '{"text": "a"}\n\n{"text": \n', ["line 3 is not JSON", "column"]),
        ("d.json", '[{"text": "a"},\n {"text" "b"}]', ["line 2 is not JSON", "column 10"]),
        ("d.json", '"a"', ["must hold an array of rows"]),
        ("d.json", '{"a": [], "b": []}', ["keys a and b"]),
        ("d.jsonl", b'{"text": "\xff"}', ["not UTF-8"]),
        ("d.jsonl", "[1]", ["row 1 (line 1)", "not an object"]),
        ("d.jsonl", '{"question": "a", "answer": "b"}', ["row 1", "question and answer", "prompt and completion"]),
        ("d.jsonl", '{"instruction": "a"}', ["row 1", "instruction and output"]),
        (
            "d.jsonl",
            '{"prompt": "a", "completion": "b"}\n{"prompt": "c"}',
            ["row 2 (line 2)", "no completion", "has prompt"],
        ),
        ("d.json", '[{"text": "a"}, {"txt": "b"}]', ["row 2", "no text", "has txt"]),
        ("d.jsonl", '{"text": 5}', ["row 1", "text must be text", "5"]),
        ("d.jsonl", '{"prompt": "a", "completion": null}', ["completion must be text", "None"]),
        ("d.jsonl", '{"text": "\\ud800"}', ["row 1", "surrogate"]),
        ("d.csv", "prompt;completion\na;b\n", ["row 1 (line 2)", "prompt;completion"]),
        ("d.csv", 'prompt,completion\n"a\nb",c\nd\n', ["row 2 (line 4)", "1 fields", "2: prompt and completion"]),
        ("d.csv", "prompt,completion\na,b,c\n", ["row 1 (line 2)", "3 fields"]),
        ("d.csv", 'text\na\n"b\n', ["line 3 is not CSV"]),
        ("d.jsonl", chat(), ["list of turns"]),
        ("d.jsonl", '{"messages": "hi"}', ["list of turns"]),
        ("d.jsonl", chat("hi"), ["message 1", "role and a content"]),
        ("d.jsonl", chat({"role": "user"}), ["message 1", "role and a content"]),
        (
            "d.jsonl",
            chat(TURNS[0], {"role": "tool", "content": "x"}),
            ["message 2", "'tool'", "system, user, assistant"],
        ),
        ("d.jsonl", chat(TURNS[0], {"role": "assistant", "content": [1]}), ["message 2", "content must be text"]),
        ("d.jsonl", chat(TURNS[0]), ["row 1", "no assistant turn"]),
        ("d.jsonl", chat(TURNS[1]), ["row 1", "no assistant turn"]),
    ],
)
def test_bad_data_is_refused_in_one_sentence(tmp_path: Path, name: str, content: str | bytes, told: list[str]) -> None:
    path = write(tmp_path, name, content)
    with pytest.raises(InputError) as caught:
        read_examples(path)
    sentence = str(caught.value)
    assert str(path) in sentence and "\n" not in sentence
    assert [part for part in told if part not in sentence] == []


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(InputError, match="no data file"):
            read_examples(path)
