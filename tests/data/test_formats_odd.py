"""Rows as people really have them: odd values, odd names, parts that lack; and rows of noise, which stop nothing."""

import datetime
import decimal
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
    preferences,
    read_examples,
)
from halfbyte.data.formats import FORMATS, examples_of
from halfbyte.data.shapes import ANSWERS, DOCUMENTS, NAMES, OWN, PAIRS
from halfbyte.errors import InputError

CASES = Path(__file__).parent / "cases"
Q, A = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}


def read(row: Any, **options: Any) -> Example | BadRow:
    [example] = examples_of([("row", row)], **options)
    return example


def chat(*texts: str, system: str | None = None) -> Chat:
    opening: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    return Chat(
        "row", opening + [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]
    )


@pytest.mark.parametrize(
    ("row", "example", "note"),
    [
        ({"prompt": 1, "completion": 2.5}, Completion("row", "1", "2.5"), cells.NUMBER),
        ({"question": True, "answer": False}, chat("true", "false"), cells.BOOLEAN),
        ({"question": "When?", "answer": datetime.date(1969, 7, 20)}, chat("When?", "1969-07-20"), cells.DATE),
        ({"question": "How much?", "answer": decimal.Decimal("1.50")}, chat("How much?", "1.50"), cells.NUMBER),
        ({"question": "Hi", "answer": ["Hello"]}, chat("Hi", "Hello"), None),
        ({"question": "Hi", "answer": ["Hello", "Hey"]}, chat("Hi", "Hello"), cells.FIRST),
        ({"question": "Hi", "answers": [{"text": "Hello", "answer_start": 3}]}, chat("Hi", "Hello"), None),
        ({"instruction": None, "input": "Hi", "output": "Hello"}, chat("Hi", "Hello"), None),
        ({"instruction": math.nan, "input": "Hi", "output": "Hello"}, chat("Hi", "Hello"), None),
        ({"instruction": "Solve.", "question": "2+2?", "answer": "4"}, chat("Solve.\n\n2+2?", "4"),
         "the question was put together from the columns instruction and question"),
        ({"question": "2+2?", "answer": "4", "solution": "It is 4."}, chat("2+2?", "4"),
         "the answer was taken from the column answer, not from solution"),
        ({"Question ": "Hi", "ANSWER": "Hello"}, chat("Hi", "Hello"), cells.RENAMED),
        ({"System-Prompt": "Be kind.", "question": "Hi", "answer": "Hello"}, chat("Hi", "Hello", system="Be kind."),
         cells.RENAMED),
        ({"question": "Hi", "Question": "not this", "answer": "Hello"}, chat("Hi", "Hello"), None),
        ({"question": "Hi", "answer": None, "response": "Hello"}, chat("Hi", "Hello"), None),
        ({"messages": None, "text": "once"}, Text("row", "once"), None),
        ({"messages": [A, Q, A]}, Chat("row", [A, Q, A]), None),
        ({"messages": [Q, Q, A, A]}, Chat("row", [Q, Q, A, A]), None),
        ({"messages": [Q, A, Q]}, Chat("row", [Q, A, Q]), None),
        ({"messages": [Q | {"content": ""}, A]}, Chat("row", [Q | {"content": ""}, A]), conversations.EMPTY_ASKED),
        ({"messages": [Q | {"extra": None}, A]}, Chat("row", [Q, A]), None),
        ({"messages": {"role": ["user", "assistant"], "content": ["Hi", "Hello"]}}, Chat("row", [Q, A]), None),
        ({"dialog": ["Hi", "Hello"]}, Chat("row", [Q, A]), conversations.IN_TURN),
        ({"messages": [Q, {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "Greet.", "signature": "x"}, {"type": "output_text", "text": "Hello"}]}]},
         Chat("row", [Q, A | {"reasoning_content": "Greet."}]), None),
        ({"messages": [Q, A], "images": []}, Chat("row", [Q, A]), None),
        ({"messages": [Q, A | {"loss_weight": 1.0}]}, Chat("row", [Q, A | {"train": True}]), None),
        ({"messages": [Q, {"role": "assistant", "content": [
            {"type": "reasoning", "value": "Greet."}, {"type": "text", "value": "Hello"}]}]},
         Chat("row", [Q, A | {"reasoning_content": "Greet."}]), None),
        ({"chosen_messages": [Q, A], "rejected_messages": [Q, A | {"content": "No"}]},
         Preference("row", [Q], [A], [A | {"content": "No"}]), None),
        ({"messages": str([Q, A])}, Chat("row", [Q, A]), cells.PYTHON),
        ({"prompt": [Q], "completion": A}, Chat("row", [Q, A]), None),
        ({"prompt": "Hi", "completion": [A]}, Chat("row", [Q, A]), None),
        ({"prompt": "[1] is what?", "completion": "[{]"}, Completion("row", "[1] is what?", "[{]"), None),
        ({"prompt": "", "completion": "b"}, Completion("row", "", "b"), None),
        ({"prompt": "a", "completion": "b", "history": [["c", "d"]]}, chat("c", "d", "a", "b"), None),
        ({"question": "c", "answer": "d", "history": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
         chat("a", "b", "c", "d"), None),
        ({"prompt": "a", "completion": "b", "label": 1}, Judged("row", "a", "b", True), preferences.NUMBERED),
        ({"prompt": "a", "completion": "b", "label": 7}, Completion("row", "a", "b"), None),
        ({"instruction": "a", "output": "b", "label": 0}, chat("a", "b"), None),
        ({"chosen": [Q, A], "rejected": [Q, A | {"content": "No"}], "system": "s"},
         Preference("row", [{"role": "system", "content": "s"}, Q], [A], [A | {"content": "No"}]), None),
        ({"text": "Human: not a transcript"}, Text("row", "Human: not a transcript"), None),
        ({"text": "<human>: Why <bot>: here?\n<bot>: So."}, chat("Why <bot>: here?", "So."), conversations.TRANSCRIPT),
        ({"from": "ann@x.org", "subject": "Hi", "text": "Hello"}, Text("row", "Hello"), None),
        ({"text": "a", "content": "b"}, Text("row", "a"), None),
    ],
)  # fmt: skip
def test_odd_rows_are_read_as_what_they_are(row: Any, example: Example, note: str | None) -> None:
    found = read(row)
    assert found == example
    assert isinstance(found, Example) and found.notes == ((note,) if note else ())


def test_calls_and_results_in_parts_are_calls_and_results() -> None:
    """Anthropic's form and OpenAI's of one conversation give one example."""
    call = {"name": "weather", "arguments": {"city": "Bonn"}}
    result = {"role": "tool", "content": "12 C", "tool_call_id": "t1"}
    use = {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Bonn"}}
    back = {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "12 C"}]}
    parts = [
        Q, {"role": "assistant", "content": [{"type": "text", "text": "I look."}, use]},
        {"role": "user", "content": [back]}, A, {"role": "user", "content": [back, {"type": "text", "text": "Hi"}]}, A,
    ]  # fmt: skip
    said = {
        "role": "assistant",
        "content": "I look.",
        "tool_calls": [{"id": "t1", "type": "function", "function": call}],
    }
    plain = [Q, said, result, A, result, Q, A]
    assert read({"messages": parts}) == read({"messages": plain}) == Chat("row", plain)


@pytest.mark.parametrize(
    ("row", "kind", "told"),
    [
        ({"question": "Hi", "answer": None}, "answer is missing", ["answer is null"]),
        ({"question": "Hi", "answer": math.nan}, "answer is missing", []),
        ({"question": "Hi", "answer": []}, "answer is missing", ["empty list"]),
        ({"question": "Hi", "answer": "\t\n"}, "answer is empty", []),
        ({"question": " ", "answer": "b"}, "question is empty", []),
        ({"question": "Hi", "answer": {"a": 1}}, "answer is no text", ['{"a": 1}']),
        ({"question": "Hi", "answer": b"\xff"}, "answer is no text", []),
        ({"question": "Hi", "answer": 10**5000}, "number too long", []),
        ({"question": "Hi", "answer": [10**5000]}, "number too long", []),
        ({"instruction": "a", "output": None, "text": "t"}, "answer is missing", ["output"]),
        ({"messages": [{"role": 10**5000}]}, "role not known", []),
        ({"messages": [Q, A | {"content": "x\udc80"}]}, "half a character", ["turn 2"]),
        ({"messages": [Q, {"role": "assistant", "content": [{"type": "image_url", "image_url": {}}]}]},
         "content is no text", ["image_url"]),
        ({"messages": [Q, A | {"name": ["x"]}]}, "the name of turn 2 is no text", []),
        ({"messages": [Q, A], "tools": [{"type": "function", "function": {}}]}, "tools are no list", ["name"]),
        ({"messages": [Q, {"from": "function_call", "value": '{"name": "f", "arguments": [1]}'}]},
         "tool call not understood", ["must be an object"]),
        ({"messages": "[" * 5000}, "messages is no JSON", []),
        ({"role": "user", "content": "Hi"}, "a message, not a conversation", ["messages"]),
        ({"from": "human", "text": "Hi"}, "a message, not a conversation", ["messages"]),
        ({"messages": [{"role": "user", "content": "<image>What is it?"}, A], "images": ["a.png"]},
         "content is no text", ["row has images for <image>"]),
        ({"messages": [Q, A | {"content": [{"type": "tool_use", "input": {}}]}]}, "tool call not understood",
         ["row, turn 2"]),
        ({"title": "a", "content": "b", "summary_of_all": "c"}, "columns not recognised", ["--columns"]),
        ({"instrution": "a", "output": "b"}, "columns not recognised",
         ["instruction, input and output", "is 'instrution' its 'instruction'?", "--columns"]),
        ({"Frage": "a", "Antwort": "b"}, "columns not recognised", ["Frage and Antwort", "question and answer"]),
        ({"source": "web", "answer": "b"}, "columns not recognised", ["source and answer"]),
        ({"Who are you?": "a", "Nobody.": "b"}, "columns not recognised", ["not names but a row, put a line"]),
        ({"chosen": [A], "rejected": [A | {"content": "No"}]}, "no prompt", []),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "answers alike", []),
        ({"prompt": "a", "chosen": "b", "rejected": None}, "answer is missing", ["rejected"]),
        ({"chosen": "\n\nHuman: a\n\nAssistant:", "rejected": "\n\nHuman: a\n\nAssistant: b"}, "answer is empty", []),
        ({"chosen": [Q, A, Q], "rejected": [Q, A, Q, A]}, "no prompt in common", []),
        ({"prompt": {"role": "user", "text": "a", "replies": "none"}}, "replies are no messages", []),
        ({"prompt": {"role": "user", "text": "a", "replies": [{"rank": "best", "text": "b"}]}}, "rank is no number",
         ['"best"']),
        ({"text": "<human>: Hi"}, "no answer", []),
        (None, "no columns", []),
        ([Q, A], "no columns", []),
    ],
)  # fmt: skip
def test_odd_rows_that_cannot_be_used_say_why(row: Any, kind: str, told: list[str]) -> None:
    bad = read(row)
    assert isinstance(bad, BadRow) and bad.kind == kind
    assert [words for words in told if words not in str(bad)] == []


@pytest.mark.parametrize(("label", "good"), [("yes", True), ("No", False), ("good", True), ("bad", False), (-1, False)])
def test_judgements_may_be_words_beside_a_prompt_and_its_completion(label: Any, good: bool) -> None:
    found = read({"prompt": "a", "completion": "b", "label": label})
    assert isinstance(found, Judged) and found.good is good
    assert isinstance(read({"question": "a", "answer": "b", "label": label}), Chat)  # some class


@pytest.mark.parametrize("columns", [["Frage", "Antwort"], ["问题", "答案"], ["doc_id", "a.b", "c-1"]])
def test_columns_with_names_are_not_taken_for_a_row(columns: list[str]) -> None:
    assert "not names" not in str(read(dict.fromkeys(columns, "x")))


@pytest.mark.parametrize("format", [*FORMATS, *NAMES])
def test_a_row_without_the_columns_of_a_named_format_is_bad(format: str) -> None:
    for row in ({"colour": "red"}, {"prompt": None}, {"text": None}, {}):
        bad = read(row, format=format)
        assert isinstance(bad, BadRow) and len(str(bad)) < 400
    bad = read({"colour": "red"}, format=format)
    assert isinstance(bad, BadRow) and bad.kind == f"not of the format {NAMES.get(format, format)}"
    assert "colour" in str(bad)


def test_the_name_of_a_format_is_found_whatever_its_case() -> None:
    assert read({"question": "Hi", "answer": "Hello"}, format=" QA ") == chat("Hi", "Hello")
    bad = read({"text": "once"}, format="transcript")
    assert isinstance(bad, BadRow) and bad.kind == "not of the format transcript"


def test_columns_that_are_named_are_used_or_told() -> None:
    row = {"Frage": "Hi", "Antwort": "Hello", "Thema": "greetings"}
    named = {"prompt": "frage", "completion": "ANTWORT "}
    assert read(row, columns=named) == Completion("row", "Hi", "Hello")
    assert read(row, columns={"question": "Frage", "answer": "Antwort", "context": "Thema"}) == chat(
        "greetings\n\nHi", "Hello"
    )
    bad = read(row, columns=named | {"context": "Thema"})
    assert isinstance(bad, BadRow) and "context" in str(bad) and bad.kind == "a named column has no place"
    lacking = read(row, columns=named | {"system": "Themma"})
    assert lacking == Completion("row", "Hi", "Hello")  # some rows may have no system text
    assert isinstance(lacking, Example) and "'Themma' (did you mean 'Thema'?)" in lacking.notes[0]
    null = {"a": None, "b": "x"}
    assert read(null, template="{a}{b}") == Text("row", "x")
    assert isinstance(read({"a": [1], "b": "x"}, template="{a}{b}"), BadRow)
    pair = read({"q": "Hi", "x": "yes", "y": "no"}, template="Say: {q}", columns={"chosen": "x", "rejected": "y"})
    assert pair == Preference("row", "Say: Hi", "yes", "no")
    assert read({"text": "mine", "a": "b"}, template="{a}") == Text("row", "b")
    assert read({"n": math.nan, "s": "x"}, template="{n}|{s}") == Text("row", "|x")


@pytest.mark.parametrize("template", ["{a.b}", "{a[0]}", "{a!r}", "{a:>9}", "{0}"])
def test_braces_of_a_template_hold_the_name_of_a_column_and_nothing_else(template: str) -> None:
    row = {"a": "x"}
    bad = read(row, template=template)
    assert isinstance(bad, BadRow) and "has no column" in str(bad)
    assert read({template[1:-1]: "y"}, template=template) == Text("row", "y")


def test_a_tree_that_never_ends_does_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    from halfbyte.data import trees

    monkeypatch.setattr(trees, "LARGEST", 10)
    message = {"message_id": "m", "parent_id": "p", "text": "t", "role": "assistant"}
    asked = 0

    def endless() -> Any:
        nonlocal asked
        while True:
            asked += 1
            yield f"row {asked}", message | {"message_id": asked}

    bad = next(examples_of(endless()))
    assert isinstance(bad, BadRow) and bad.kind == "tree is torn" and asked <= 11


def test_two_messages_of_one_id_are_told() -> None:
    rows = [{"message_id": 1, "parent_id": None, "text": "t", "role": "prompter"}]
    rows += [{"message_id": 2, "parent_id": 1, "text": str(n), "role": "assistant"} for n in range(2)]
    [bad] = examples_of([("row", row) for row in rows])
    assert isinstance(bad, BadRow) and "message_id" in str(bad)


def test_shapes_of_a_mixed_file_are_counted() -> None:
    counts: Counter[str] = Counter()
    rows = read_examples(str(CASES / "20-mixed-shapes.jsonl"), counts=counts)
    assert [type(example) for example in rows] == [Chat, Text, Completion]
    assert counts == {"alpaca": 1, "text": 1, "completion": 1}


NAMES_OF_COLUMNS = sorted(
    {
        *OWN, *ANSWERS, *DOCUMENTS, *conversations.TURNS, "message_id", "parent_id", "role", "from", "replies", "value",
        "Answer", " text", "",
    }
    | {name for pair in PAIRS for names in pair for name in names}
)  # fmt: skip
SCALARS = (
    st.none() | st.sampled_from(["text", "thinking", "tool_use", "tool_result", "<image>"]) | st.integers()
    | st.booleans() | st.none().map(lambda _: 10**5000) | st.floats() | st.text(st.characters()) | st.binary(max_size=3)
    | st.sampled_from(["user", "assistant", "gpt", "true", "[{", '{"role": "user"}', "\n\nHuman: a\n\nAssistant:",
                       "<human>: a\n<bot>:", "### Human: a### Assistant: b", '[{"name": "f", "arguments": {}}]'])
)  # fmt: skip
KEYS = st.sampled_from(
    ["role", "from", "content", "value", "text", "type", "tool_calls", "function", "name", "arguments", "weight",
     "train", "thinking", "replies", "tool_use_id", "images", "rank", "input", "output", "deleted", "message_id"]
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=8,
)
ROWS = st.dictionaries(st.sampled_from(NAMES_OF_COLUMNS), VALUES, max_size=5) | VALUES


@settings(max_examples=400)
@given(
    st.lists(ROWS, max_size=3),
    st.none() | st.sampled_from([*FORMATS]),
    st.none() | st.dictionaries(st.sampled_from([*OWN]), st.sampled_from(NAMES_OF_COLUMNS), max_size=3),
    st.none() | st.sampled_from(["{text}", "{prompt} {{}}: {messages}"]),
)
def test_noise_is_an_example_or_a_bad_row_and_never_anything_else(
    rows: list[Any], format: str | None, columns: dict[str, str] | None, template: str | None
) -> None:
    counts: Counter[str] = Counter()
    found = list(
        examples_of(
            [(f"row {n}", row) for n, row in enumerate(rows)],
            format=format, columns=columns, template=template, counts=counts,
        )
    )  # fmt: skip
    assert sum(counts.values()) == sum(not isinstance(example, BadRow) for example in found)
    assert len(found) == len(rows) or any(isinstance(row, dict) and "parent_id" in row for row in rows)
    for example in found:
        match example:
            case BadRow():
                assert str(example).startswith("row ") and "\n" not in str(example)
            case Chat(messages=messages):
                assert any(turn["role"] == "assistant" for turn in messages[1:])
                assert all(isinstance(turn["content"], str) and turn["role"] in ROLES for turn in messages)
            case Completion(completion=text) | Text(text=text):
                assert text.strip() and text.encode()
            case Preference() | Judged():
                pass
            case _:
                raise AssertionError(example)


ROLES = {"system", "user", "assistant", "tool"}


def test_an_unknown_format_or_column_is_an_error_at_once() -> None:
    with pytest.raises(InputError, match="did you mean 'sharegpt'"):
        examples_of([], format="share-gpt")
    with pytest.raises(InputError, match="did you mean 'completion'"):
        examples_of([], columns={"compleetion": "a"})
