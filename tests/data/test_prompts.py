"""What rows ask, and what they say should come, in every shape that training reads and without their answers."""

from pathlib import Path
from typing import Any

import pytest

from halfbyte.data.examples import BadRow
from halfbyte.data.prompts import Asked, Named, asked_of
from halfbyte.data.readers import read_rows

USER = {"role": "user", "content": "why?"}
SYSTEM = {"role": "system", "content": "be kind"}
BEFORE = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
SAID = {"role": "assistant", "content": "so"}
CASES: dict[str, tuple[Any, list[dict[str, Any]], str | None]] = {
    "a prompt": ({"prompt": "why?"}, [USER], None),
    "a prompt and its answer": ({"prompt": "why?", "completion": "so"}, [USER], "so"),
    "a prompt of turns": ({"prompt": [SYSTEM, USER]}, [SYSTEM, USER], None),
    "a prompt whose answer is empty": ({"Prompt": "why?", "response": None, "id": 3}, [USER], None),
    "a conversation that waits": ({"messages": [*BEFORE, USER]}, [*BEFORE, USER], None),
    "a conversation that is whole": ({"messages": [SYSTEM, USER, SAID]}, [SYSTEM, USER], "so"),
    "ShareGPT": ({"system": "be kind", "conversations": [{"from": "human", "value": "why?"}]}, [SYSTEM, USER], None),
    "an instruction": ({"instruction": "do", "input": "it"}, [{"role": "user", "content": "do\n\nit"}], None),
    "an instruction without input": ({"instruction": "why?", "input": "", "output": ""}, [USER], None),
    "alpaca": ({"instruction": "why?", "input": "", "output": "so"}, [USER], "so"),
    "a question": ({"question": "why?"}, [USER], None),
    "a question and its answer": ({"question": "why?", "answer": "so"}, [USER], "so"),
    "an input": ({"input": "why?"}, [USER], None),
    "a pair of answers": ({"prompt": "why?", "chosen": "so", "rejected": "no"}, [USER], "so"),
    "a text": ({"text": "why?"}, [USER], None),
    "a string": ("why?", [USER], None),
}


@pytest.mark.parametrize("name", CASES)
def test_a_row_asks(name: str) -> None:
    row, turns, reference = CASES[name]
    [asked] = asked_of([("f, row 1", row)])
    assert isinstance(asked, Asked), asked
    assert [{key: turn[key] for key in ("role", "content")} for turn in asked.turns] == turns
    assert (asked.reference, asked.where) == (reference, "f, row 1")
    assert asked.row == ({"text": row} if isinstance(row, str) else row)


@pytest.mark.parametrize(
    ("row", "about"),
    [
        ({"prompt": " "}, "asks nothing"),
        ({"messages": [SAID]}, "no turn of the user"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "wizard"),
        ({"apples": 1}, "make no known shape"),
        ([1], "not an object"),
        ({"messages": "x"}, "messages"),
    ],
)
def test_a_row_that_asks_nothing_is_told_with_its_place(row: Any, about: str) -> None:
    [bad] = asked_of([("f, row 7", row)])
    assert isinstance(bad, BadRow) and str(bad).startswith("f, row 7") and about in str(bad)


def test_files_are_read_as_in_training(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("prompt;answer\nwhy?;so\n", encoding="utf-8")
    [asked] = asked_of(read_rows(file))
    assert isinstance(asked, Asked) and (asked.prompt, asked.reference) == ("why?", "so")


@pytest.mark.parametrize(
    ("row", "way", "prompt", "reference"),
    [
        ({"Frage": "why?", "Antwort": "so"}, ({"prompt": "Frage", "completion": "Antwort"}, None), "why?", "so"),
        ({"Frage": "why?", "prompt": "not this"}, ({"prompt": "Frage", "completion": "Antwort"}, None), "why?", None),
        ({"Frage": "why?", "Antwort": ""}, ({"question": "frage", "answer": "antwort"}, None), "why?", None),
        ({"F": "do", "I": "it"}, ({"instruction": "F", "input": "I", "output": "A"}, None), "do\n\nit", None),
        ({"F": "why?"}, ({"prompt": "F", "chosen": "C", "rejected": "R"}, None), "why?", None),
        ({"dialog": [USER, SAID]}, ({"messages": "dialog"}, None), "why?", "so"),
        ({"body": "why?"}, ({"text": "body"}, None), "why?", None),
        ({"en": "dog"}, ({"completion": "de"}, "Translate {en}:"), "Translate dog:", None),
        ({"en": "dog", "de": "Hund"}, ({"completion": "de"}, "Translate {en}:"), "Translate dog:", "Hund"),
        ({"en": "dog"}, (None, "{en}!"), "dog!", None),
    ],
)
def test_a_row_asks_by_the_columns_that_somebody_named(
    row: dict[str, Any], way: Any, prompt: str, reference: str | None
) -> None:
    [asked] = asked_of([("f, row 1", row)], Named([way]))
    assert isinstance(asked, Asked), asked
    assert [turn["content"] for turn in asked.turns] == [prompt]
    assert (asked.reference, asked.row) == (reference, row)


def test_a_row_without_the_named_columns_is_bad_or_tells_its_own_shape() -> None:
    ways = [({"prompt": "Frage"}, None), ({"completion": "de"}, "Translate {en}:")]
    rows = [("row 1", {"prompt": "why?"}), ("row 2", "why?"), ("row 3", {"en": "dog"}), ("row 4", {"Frage": "wer?"})]
    found = list(asked_of(rows, Named(ways, always=False)))
    assert [asked.prompt for asked in found if isinstance(asked, Asked)] == ["why?", "why?", "Translate dog:", "wer?"]
    bad = list(asked_of(rows[:3], Named(ways[:1])))
    assert all(isinstance(row, BadRow) and "no column 'Frage'" in str(row) for row in bad)
    for cell, told in (({"a": 1}, "must be text"), (" ", "is empty")):
        [row] = asked_of([("row 5", {"Frage": cell})], Named(ways))
        assert isinstance(row, BadRow) and f"'Frage' (named as the prompt) {told}" in str(row)
