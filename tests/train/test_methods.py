"""The table of methods: what belongs to one of them is refused by the others."""

import dataclasses
from pathlib import Path

import pytest

from halfbyte import data
from halfbyte.data.examples import LeftOut
from halfbyte.errors import InputError
from halfbyte.runs.config import TrainConfig
from halfbyte.train.methods import METHODS, method_of


@pytest.fixture
def _another(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second method, which learns from texts alone and has an option of its own."""
    other = dataclasses.replace(METHODS["sft"], examples=data.Text, options=frozenset({"group_by_length"}))
    monkeypatch.setitem(METHODS, "texts", other)


def config(**options: object) -> TrainConfig:
    return TrainConfig(model="m", data="d", output=Path("o"), **options)  # type: ignore[arg-type]


@pytest.mark.usefixtures("_another")
def test_an_option_of_another_method_is_refused_where_it_was_given() -> None:
    assert method_of(config()) is METHODS["sft"]
    with pytest.raises(InputError, match="option 'group_by_length' belongs to method texts, but the method is sft"):
        method_of(config(group_by_length=False))
    chosen = config(group_by_length=False).model_copy(update={"method": "texts"})
    assert method_of(chosen) is METHODS["texts"]


@pytest.mark.usefixtures("_another")
def test_rows_of_a_shape_that_a_method_does_not_learn_from_are_bad_rows() -> None:
    text, completion, bad = (
        data.Text("row 1", "a"),
        data.Completion("row 2", "a", "b"),
        data.BadRow("row 3", "k", "is."),
    )
    for example in (text, completion, bad):
        assert METHODS["sft"].take("sft", example) is example
    assert METHODS["texts"].take("texts", text) is text and METHODS["texts"].take("texts", bad) is bad
    refused = METHODS["texts"].take("texts", completion)
    assert isinstance(refused, data.BadRow)
    assert "row 2 is a Completion, but method texts learns from Text rows" in str(refused)


def test_sft_learns_the_preferred_of_two_answers_and_says_so() -> None:
    turns: list[data.Message] = [{"role": "user", "content": "a"}]
    answer: list[data.Message] = [{"role": "assistant", "content": "b"}]
    other: list[data.Message] = [{"role": "assistant", "content": "c"}]
    sft = METHODS["sft"]
    pair = sft.take("sft", data.Preference("row", turns, answer, other))
    assert pair == data.Chat("row", [*turns, *answer])
    assert isinstance(pair, data.Example) and pair.notes == ("only the chosen one of two answers is trained",)
    assert sft.take("sft", data.Preference("row", "a", "b", "c")) == data.Completion("row", "a", "b")
    assert sft.take("sft", data.Preference("row", "a", answer, other)) == data.Chat("row", [*turns, *answer])
    assert sft.take("sft", data.Judged("row", "a", "b", True)) == data.Completion("row", "a", "b")
    assert isinstance(sft.take("sft", data.Judged("row", "a", "b", False)), LeftOut)
    assert METHODS["kto"].take("kto", judged := data.Judged("row", "a", "b", False)) is judged
