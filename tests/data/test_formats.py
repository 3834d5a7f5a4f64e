"""Rows to examples: every shape that data sets have, what is said of it, and rows that cannot be used."""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from halfbyte.data import (
    BadRow,
    Chat,
    Completion,
    Example,
    Judged,
    Message,
    Preference,
    Text,
    cells,
    conversations,
    read_examples,
)
from halfbyte.data.formats import examples_of
from halfbyte.data.shapes import FORMATS
from halfbyte.errors import InputError

Turns = list[Message]


def turns(*texts: str, system: str | None = None) -> Turns:
    """A conversation of questions and answers."""
    opening: Turns = [] if system is None else [{"role": "system", "content": system}]
    return opening + [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


HI = turns("Hi", "Hello")


def read(row: Any, **options: Any) -> Example | BadRow:
    [example] = examples_of([("row", row)], **options)
    return example


def share(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [{"from": role, "value": text} for role, text in pairs]


@pytest.mark.parametrize(
    ("row", "example"),
    [
        ({"messages": HI}, Chat("row", HI)),
        ({"messages": json.dumps(HI)}, Chat("row", HI)),  # as in a field of CSV
        ({"messages": HI, "system": "Be kind."}, Chat("row", turns("Hi", "Hello", system="Be kind."))),
        ({"messages": turns("Hi", "Hello", system="a"), "system": "b"},
         Chat("row", [{"role": "system", "content": "b"}, *turns("Hi", "Hello", system="a")])),
        ({"conversations": share(("human", "Hi"), ("gpt", "Hello"))}, Chat("row", HI)),
        ({"conversations": HI}, Chat("row", HI)),
        ({"conversation": share(("User", "Hi"), ("ChatGPT", "Hello"))}, Chat("row", HI)),
        (
            {"conversations": share(("system", "s"), ("prompter", "Hi"), ("bard", "Hello"), ("human", "Bye"))},
            Chat("row", [*turns("Hi", "Hello", "Bye", system="s")]),
        ),
        ({"messages": [{"role": "developer", "content": "s"}, *HI]}, Chat("row", turns("Hi", "Hello", system="s"))),
        ({"messages": [{"role": "assistant", "content": "Welcome"}, *HI]},
         Chat("row", [{"role": "assistant", "content": "Welcome"}, *HI])),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "H"}, {"text": "i"}]}, HI[1]]},
         Chat("row", HI)),
        ({"messages": [HI[0], HI[1] | {"train": False}, *turns("Bye", "Now")]},
         Chat("row", [HI[0], HI[1] | {"train": False}, *turns("Bye", "Now")])),
        ({"messages": [HI[0], HI[1] | {"weight": 0}, *turns("Bye", "Now")]},
         Chat("row", [HI[0], HI[1] | {"train": False}, *turns("Bye", "Now")])),
        ({"messages": [HI[0], HI[1] | {"reasoning_content": "So."}]},
         Chat("row", [HI[0], HI[1] | {"reasoning_content": "So."}])),
        ({"messages": [HI[0], HI[1] | {"thinking": "So."}]},
         Chat("row", [HI[0], HI[1] | {"reasoning_content": "So."}])),
        ({"instruction": "Hi", "output": "Hello"}, Chat("row", HI)),
        ({"instruction": "Hi", "input": "", "output": "Hello"}, Chat("row", HI)),
        ({"instruction": "Hi", "input": None, "output": "Hello"}, Chat("row", HI)),
        ({"instruction": "Hi", "input": float("nan"), "output": "Hello"}, Chat("row", HI)),
        ({"Instruction": "Hi", " Output ": "Hello"}, Chat("row", HI)),
        ({"instruction": "Hi", "response": "Hello"}, Chat("row", HI)),
        ({"instruction": "Add", "input": "1 2", "output": 3}, Chat("row", turns("Add\n\n1 2", "3"))),
        ({"instruction": "Hi", "output": "Hello", "system": "s"}, Chat("row", turns("Hi", "Hello", system="s"))),
        ({"instruction": "c", "output": "d", "history": [["a", "b"]]}, Chat("row", turns("a", "b", "c", "d"))),
        ({"question": "Hi", "answer": "Hello"}, Chat("row", HI)),
        ({"query": "Hi", "response": "Hello"}, Chat("row", HI)),
        ({"problem": "Hi", "solution": "Hello"}, Chat("row", HI)),
        ({"inputs": "Hi", "targets": "Hello"}, Chat("row", HI)),
        ({"input": "Hi", "output": "Hello"}, Chat("row", HI)),
        ({"source": "Hi", "target": "Hello"}, Chat("row", HI)),
        ({"context": "Late.", "question": "Hi", "answer": "Hello"}, Chat("row", turns("Late.\n\nHi", "Hello"))),
        ({"context": "c", "question": "Hi", "answers": {"text": ["Hello", "Hey"], "answer_start": [0, 1]}},
         Chat("row", turns("c\n\nHi", "Hello"))),
        ({"prompt": "a ", "completion": "b"}, Completion("row", "a ", "b")),
        ({"prompt": "a", "response": "b"}, Completion("row", "a", "b")),
        ({"prompt": "Hi", "completion": "Hello", "system": "s"}, Chat("row", turns("Hi", "Hello", system="s"))),
        ({"prompt": HI[:1], "completion": HI[1:]}, Chat("row", HI)),
        ({"prompt": HI[:1], "completion": "Hello"}, Chat("row", HI)),
        ({"prompt": "a", "completion": "b", "label": "sports"}, Completion("row", "a", "b")),
        ({"prompt": "a", "completion": "b", "label": True}, Judged("row", "a", "b", True)),
        ({"prompt": HI[:1], "completion": HI[1:], "label": False}, Judged("row", HI[:1], HI[1:], False)),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, Preference("row", "a", "b", "c")),
        ({"question": "a", "chosen": "b", "rejected": "c", "system": "s"},
         Preference("row", turns("a", system="s"), turns("", "b")[1:], turns("", "c")[1:])),
        ({"prompt": HI[:1], "chosen": HI[1:], "rejected": turns("", "No")[1:]},
         Preference("row", HI[:1], HI[1:], turns("", "No")[1:])),
        ({"chosen": HI, "rejected": turns("Hi", "No")}, Preference("row", HI[:1], HI[1:], turns("", "No")[1:])),
        ({"prompt": "Hi", "chosen": HI, "rejected": turns("Hi", "No")},
         Preference("row", HI[:1], HI[1:], turns("", "No")[1:])),
        ({"chosen": "\n\nHuman: Hi\n\nAssistant: Hello", "rejected": "\n\nHuman: Hi\n\nAssistant: No"},
         Preference("row", HI[:1], HI[1:], turns("", "No")[1:])),
        ({"text": "<human>: Hi\n<bot>: Hello"}, Chat("row", HI)),
        ({"text": "### Human: Hi### Assistant: Hello"}, Chat("row", HI)),
        ({"text": "once\n"}, Text("row", "once\n")),
        ({"content": "once"}, Text("row", "once")),
        ("once", Text("row", "once")),
    ],
)  # fmt: skip
def test_each_shape_of_row_becomes_its_example(row: Any, example: Example) -> None:
    assert read(row) == example


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "null"),
        (math.nan, "NaN"),
        ({"a": 1, "b": [True, None]}, '{"a": 1, "b": [true, null]}'),
        ({"é": 'it\'s "x"\n'}, r'{"é": "it\'s \"x\"\n"}'.replace("\\'", "'")),
        ({"a": "\u2028é"}, r'{"a": "\u2028\u00e9"}'),
        ({"a": "x" * 99}, '{"a": "' + "x" * 30 + '..."}'),
    ],
)
def test_values_are_shown_as_json_has_them(value: Any, shown: str) -> None:
    assert f"completion {'is' if value is None or value != value else 'must be text, but it is'} {shown};" in str(
        read({"prompt": "a", "completion": value})
    )


def test_an_example_tells_what_it_does_not_use() -> None:
    for row, unused in [
        ({"instruction": "a", "output": "b", "text": "ignored", "id": 7}, ("text", "id")),
        ({"messages": HI, "source": "web"}, ("source",)),
        ({"prompt": "a", "completion": "b", "label": "sports"}, ("label",)),
    ]:
        assert read(row).unused == unused  # type: ignore[union-attr]
    example = read({"messages": [HI[0] | {"score": 3}, HI[1]]})
    assert isinstance(example, Chat) and "messages[].score" in example.notes[0]


@pytest.mark.parametrize(
    ("row", "note"),
    [
        ({"instruction": "a", "output": 4}, cells.NUMBER),
        ({"instruction": "a", "output": True}, cells.BOOLEAN),
        ({"Instruction": "a", "Output": "b"}, cells.RENAMED),
        ({"messages": json.dumps(HI)}, cells.PARSED),
        ({"question": "a", "answers": ["b", "c"]}, cells.FIRST),
        ({"messages": [{"role": "developer", "content": "s"}, *HI]}, conversations.DEVELOPER),
        ({"messages": [*HI, *turns("Bye", "")]}, conversations.EMPTY),
        ({"messages": [HI[0], HI[1] | {"weight": 0.5}]}, conversations.WEIGHTS),
    ],
)  # fmt: skip
def test_what_was_made_of_a_row_is_noted(row: Any, note: str) -> None:
    example = read(row)
    assert isinstance(example, Example) and example.notes == (note,)


CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Bonn"}}}
WEATHER = {"name": "weather", "description": "Weather of a city.", "parameters": {"type": "object"}}


def test_calls_of_tools_are_read_however_they_are_written() -> None:
    question, result = {"role": "user", "content": "Weather?"}, {"role": "tool", "name": "weather", "content": "12 C"}
    expected = [question, {"role": "assistant", "content": "", "tool_calls": [CALL]}, result, *turns("", "12.")[1:]]
    as_text = CALL | {"function": {"name": "weather", "arguments": '{"city": "Bonn"}'}}
    function = CALL["function"]
    for call in (
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "content": None, "tool_calls": [as_text]},
        {"role": "assistant", "tool_calls": json.dumps([CALL])},
        {"role": "assistant", "content": "", "function_call": function},
        {"from": "function_call", "value": json.dumps(function)},
    ):
        for tools in ([{"type": "function", "function": WEATHER}], [WEATHER], json.dumps([WEATHER])):
            chat = read({"messages": [question, call, result, *expected[3:]], "tools": tools})
            assert chat == Chat("row", expected, tools=[{"type": "function", "function": WEATHER}])
    observed = read({"conversations": share(("human", "a"), ("observation", "b"), ("gpt", "c"))})
    assert isinstance(observed, Chat) and [turn["role"] for turn in observed.messages] == ["user", "tool", "assistant"]


def tree(*path: str, rank: int | None = 0) -> dict[str, Any]:
    """A tree with the path of these texts, and beside each reply a worse one that comes first."""
    node: dict[str, Any] = {"role": ("prompter", "assistant")[(len(path) - 1) % 2], "text": path[-1], "replies": []}
    for depth in range(len(path) - 2, -1, -1):
        worse = node | {"text": "worse", "rank": 1, "replies": []}
        role = ("prompter", "assistant")[depth % 2]
        node = {"role": role, "text": path[depth], "replies": [worse, node | {"rank": rank}]}
    return node


def test_of_a_tree_the_best_path_is_taken() -> None:
    assert read({"message_tree_id": "1", "prompt": tree("a", "b", "c", "d")}) == Chat("row", turns("a", "b", "c", "d"))
    assert read({"prompt": tree("a", "b", "c")}) == Chat("row", turns("a", "b"))
    assert isinstance(read({"prompt": tree("a")}), BadRow)


def test_messages_of_a_tree_that_stand_in_rows_become_one_conversation() -> None:
    def rows(name: str) -> list[tuple[str, Any]]:
        written = [("a", None, "prompter", None), ("b", "a", "assistant", 1), ("c", "a", "assistant", 0),
                   ("d", "c", "prompter", 0), ("e", "d", "assistant", 0)]  # fmt: skip
        keys = ("message_id", "parent_id", "role", "rank", "text", "message_tree_id")
        return [
            (f"row {name}{i}", dict(zip(keys, (name + i, p and name + p, role, rank, i, name), strict=True)))
            for i, p, role, rank in written
        ]

    found = list(examples_of([*rows("x"), *rows("y"), ("row", {"text": "t"})]))
    assert found == [
        Chat("row xa", turns("a", "c", "d", "e")),
        Chat("row ya", turns("a", "c", "d", "e")),
        Text("row", "t"),
    ]
    [torn, _] = examples_of([*rows("x")[1:], *rows("y")])
    assert isinstance(torn, BadRow) and torn.kind == "tree is torn"


def test_a_file_may_mix_shapes_which_are_counted() -> None:
    counts: Counter[str] = Counter()
    rows = [{"text": "a"}, {"instruction": "a", "output": "b"}, {"txt": "a"}, {"text": "b"}, {"instruction": "a"}]
    found = list(examples_of([(f"row {n}", row) for n, row in enumerate(rows)], counts=counts))
    assert [type(example).__name__ for example in found] == ["Text", "Chat", "BadRow", "Text", "BadRow"]
    assert counts == {"text": 2, "alpaca": 1}


def test_columns_of_ones_own() -> None:
    row = {"Frage": "Hi", "Antwort": "Hello", "Thema": "greetings", "text": "not this"}
    columns = {"prompt": "Frage", "completion": "Antwort"}
    example = read(row, columns=columns)
    assert example == Completion("row", "Hi", "Hello")
    assert isinstance(example, Example) and example.unused == ("Thema", "text")
    assert read(row, columns=columns | {"system": "Thema"}) == Chat("row", turns("Hi", "Hello", system="greetings"))
    bad = read(row, columns={"prompt": "Frag", "completion": "Antwort"})
    assert isinstance(bad, BadRow) and "'Frag' (did you mean 'Frage'?)" in str(bad) and "Thema" in str(bad)
    with pytest.raises(InputError, match=r"'promt'.*did you mean 'prompt'"):
        read(row, columns={"promt": "Frage"})


def test_a_column_that_was_not_named_is_told_under_its_own_name() -> None:
    bad = read({"Frage": "a", "Antwort": "b"}, columns={"prompt": "Frage"})
    assert isinstance(bad, BadRow)
    assert str(bad).startswith(
        "row has the columns Frage and Antwort ('Frage' is named as the prompt), which make no known shape; the near"
    )
    bad = read({"Frage": "a", "Antwort": "b"}, columns={"prompt": "Frage"}, format="completion")
    assert "columns Frage and Antwort ('Frage' is named as the prompt), but the format completion needs " in str(bad)


@pytest.mark.parametrize(
    ("row", "columns", "told"),
    [
        ({"F": "a", "A": ""}, {"prompt": "F", "completion": "A"}, ": 'A' (named as the completion) is empty, so"),
        ({"F": "a", "A": None}, {"question": "F", "answer": "a"}, ": 'A' (named as the answer) is null; fill it in"),
        ({"F": "a", "A": []}, {"prompt": "F", "completion": "A"}, ": 'A' (named as the completion) is an empty list;"),
        ({"F": "", "I": "", "A": "b"}, {"instruction": "F", "output": "A", "input": "I"}, ": 'F' (named as the instr"),
        ({"F": {"a": 1}, "A": "b"}, {"prompt": "F", "completion": "A"}, ": 'F' (named as the prompt) must be text"),
        ({"my text": " "}, {"text": "my text"}, ": 'my text' (named as the text) is empty:"),
        ({"t": None}, {"messages": "t"}, ": 't' (named as the messages) is null; fill it in"),
        ({"t": 3}, {"messages": "t"}, ": 't' (named as the messages) must be a list of turns"),
        ({"en": "a", "de": ""}, {"completion": "de"}, ": 'de' (named as the completion) is empty"),
        ({"en": ["a"], "de": "b"}, {"completion": "de"}, ": en must be text"),
    ],
)
def test_a_cell_that_cannot_be_used_is_told_by_the_column_and_what_it_was_named_as(
    row: dict[str, Any], columns: dict[str, str], told: str
) -> None:
    bad = read(row, columns=columns, template="Translate {en}:" if "en" in row else None)
    assert isinstance(bad, BadRow) and str(bad).startswith(f"row{told}"), bad


def test_templates_of_ones_own() -> None:
    row = {"en": "dog", "de": "Hund", "n": 3}
    assert read(row, template="{en} = {de} ({n}) {{}}") == Text("row", "dog = Hund (3) {}")
    example = read(row, template="Translate {en}:", columns={"completion": "de"})
    assert example == Completion("row", "Translate dog:", "Hund")
    bad = read(row, template="{en} {dee}")
    assert isinstance(bad, BadRow) and "'dee' (did you mean 'de'?)" in str(bad)
    for template, told in [("{en", "brace"), ("no column", "names no column"), ("{}", "without a column's name")]:
        with pytest.raises(InputError, match=told):
            read(row, template=template)
    assert isinstance(
        read({"__class__": "x"}, template="{__class__.__mro__}"), BadRow
    )  # names of columns, nothing else


def test_a_format_can_be_named() -> None:
    row = {"question": "a", "answer": "b", "text": "c"}
    assert read(row, format="text") == Text("row", "c")
    assert isinstance(read({"question": "a", "answer": "b"}, format="text"), BadRow)
    assert read({"conversations": share(("human", "Hi"), ("gpt", "Hello"))}, format="sharegpt") == Chat("row", HI)
    with pytest.raises(InputError, match=r"no format 'alpacca'.*did you mean 'alpaca'"):
        read(row, format="alpacca")


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ([1], ["not an object"]),
        (5, ["not an object", "5"]),
        ({}, ["(none)"]),
        ({"role": "user", "content": "Hi"}, ["columns role and content"]),
        ({"instruction": "a"}, ["columns instruction", "instruction, input and output"]),
        ({"a\nb": 1, "\ud800": 2}, ["'a\\nb' and '\\ud800'"]),
        ({"text": [5]}, ["text must be text", "[5]"]),
        ({"text": {"a": 1}}, ["text must be text"]),
        ({"text": None}, ["text is null"]),
        ({"text": " \n"}, ["text is empty"]),
        ({"text": "\ud800"}, ["surrogate"]),
        ({"prompt": "a", "completion": None}, ["completion is null"]),
        ({"prompt": "a", "completion": ""}, ["completion is empty"]),
        ({"instruction": "", "output": "b"}, ["instruction is empty"]),
        ({"instruction": "a", "output": " "}, ["output is empty"]),
        ({"instruction": "a", "output": float("nan")}, ["output is NaN"]),
        ({"instruction": "a", "output": "b", "history": "c"}, ["history"]),
        ({"question": "a", "answers": {"text": []}}, ["answer"]),
        ({"messages": []}, ["list of turns"]),
        ({"messages": "hi"}, ["list of turns"]),
        ({"messages": "[{]"}, ["neither a list nor JSON"]),
        ({"messages": ["hi"]}, ["list of turns"]),
        ({"messages": [{"role": "user"}]}, ["turn 1", "null"]),
        ({"messages": [HI[0], {"role": "narrator", "content": "x"}]}, ["turn 2", '"narrator"', "user"]),
        ({"messages": [{"role": ["x"] * 999, "content": ""}]}, ["turn 1", 'has the role ["x", "x", ']),
        ({"messages": [HI[0], {"role": "assistant", "content": [1]}]}, ["turn 2", "holds 1"]),
        ({"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}, HI[1]]}, ["turn 1", "image"]),
        ({"messages": HI[:1]}, ["no assistant turn"]),
        ({"messages": HI[1:]}, ["no assistant turn"]),
        ({"messages": [HI[0], {"role": "assistant", "content": ""}]}, ["empty answers only"]),
        ({"messages": [HI[0], HI[1] | {"train": False}]}, ["not to be trained"]),
        ({"messages": [HI[0], HI[1] | {"weight": "high"}]}, ['weight "high"']),
        ({"messages": [HI[0], {"role": "assistant", "tool_calls": ["x"]}]}, ["turn 2", "name and arguments"]),
        ({"messages": [HI[0], {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}]}, ["no JSON"]),
        ({"messages": HI, "tools": "none"}, ["tools must be a list"]),
        ({"chosen": "a", "rejected": "b"}, ["without a prompt"]),
        ({"chosen": HI, "rejected": HI}, ["alike"]),
        ({"chosen": HI, "rejected": turns("Ho", "No")}, ["share no prompt"]),
        ({"prompt": {"role": "clown", "text": "a", "replies": []}}, ['"clown"']),
    ],
)
def test_a_bad_row_is_told_in_one_sentence(row: Any, told: list[str]) -> None:
    bad = read(row)
    assert isinstance(bad, BadRow)
    sentence = str(bad)
    assert sentence.startswith("row") and "\n" not in sentence and len(bad.kind) < 40
    assert [part for part in told if part not in sentence] == []


def test_every_format_says_its_columns() -> None:
    assert all(form.about for form in FORMATS.values())


def test_examples_are_read_as_they_are_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "a"}\n{"text": "b"}\nno row')
    examples = read_examples(path)
    assert [next(examples), next(examples)] == [Text(f"{path}, row {n} (line {n})", "ab"[n - 1]) for n in (1, 2)]
    assert isinstance(next(examples), BadRow)
