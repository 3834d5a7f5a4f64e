import json
from pathlib import Path

import pytest

from halfbyte.data import Chat, Completion, Example, Text, read_examples
from halfbyte.errors import InputError

TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize(
    ("row", "example", "unused"),
    [
        ({"messages": TURNS, "text": "ignored"}, Chat("", TURNS), ("text",)),
        ({"instruction": "Hi", "output": "Hello", "text": "ignored"}, Chat("", TURNS), ("text",)),
        ({"instruction": "Hi", "input": "", "output": "Hello"}, Chat("", TURNS), ()),
        ({"instruction": "Hi", "input": None, "output": "Hello"}, Chat("", TURNS), ()),
        (
            {"instruction": "Add", "input": "1 2", "output": "3", "system": "s", "weight": 2},
            Chat("", [{"role": "user", "content": "Add\n\n1 2"}, {"role": "assistant", "content": "3"}]),
            ("system", "weight"),
        ),
        ({"prompt": "a ", "completion": "b", "id": 7}, Completion("", "a ", "b"), ("id",)),
        ({"text": "once\n"}, Text("", "once\n"), ()),
    ],
)
def test_each_format_of_row_becomes_its_example_and_tells_what_it_does_not_use(
    tmp_path: Path, row: dict[str, object], example: Example, unused: tuple[str, ...]
) -> None:
    path = write(tmp_path, "d.jsonl", "\n" + json.dumps(row))
    [read] = read_examples(path)
    assert vars(read) == vars(example) | {"where": f"{path}, row 1 (line 2)", "unused": unused}


def test_examples_are_read_as_they_are_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path, "d.jsonl", '{"text": "a"}\n{"text": "b"}\nno row')
    examples = read_examples(path)
    assert [next(examples), next(examples)] == [
        Text(f"{path}, row 1 (line 1)", "a"),
        Text(f"{path}, row 2 (line 2)", "b"),
    ]
    with pytest.raises(InputError, match="line 3 is not JSON"):
        next(examples)


def chat(*turns: object) -> str:
    return json.dumps({"messages": list(turns)})


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
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
        ("d.jsonl", '{"text": NaN}', ["row 1", "text must be text", "nan"]),
        ("d.jsonl", '{"text": -Infinity}', ["row 1", "text must be text", "-inf"]),
        ("d.jsonl", f'{{"text": {"[" * 500}{"]" * 500}}}', ["row 1", "text must be text", "[[["]),
        ("d.jsonl", '{"a\\nb": 1, "\\ud800": 2}', ["row 1", "'a\\nb' and '\\ud800'"]),
        ("d.jsonl", "{}", ["row 1", "(none)"]),
        ("d.jsonl", '{"text": "a"}\n{}', ["row 2", "has nothing"]),
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
        ("d.jsonl", chat({"role": ["x"] * 999, "content": ""}), ["message 1", "has the role ['x', 'x', "]),
        ("d.jsonl", chat(TURNS[0]), ["row 1", "no assistant turn"]),
        ("d.jsonl", chat(TURNS[1]), ["row 1", "no assistant turn"]),
    ],
)
def test_a_bad_row_is_refused_in_one_sentence(tmp_path: Path, name: str, content: str | bytes, told: list[str]) -> None:
    path = write(tmp_path, name, content)
    with pytest.raises(InputError) as caught:
        list(read_examples(path))
    sentence = str(caught.value)
    assert str(path) in sentence and "\n" not in sentence
    assert [part for part in told if part not in sentence] == []
