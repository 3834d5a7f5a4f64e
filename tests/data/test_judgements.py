"""Labels that judge an answer, labels that do not, and the two side by side in one source."""

from typing import Any

import pytest

from halfbyte.data import BadRow, Completion, Judged, Text
from halfbyte.data.formats import examples_of

Q, A = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}


def labelled(*labels: Any) -> list[tuple[str, Any]]:
    return [(f"row {n}", {"prompt": "a", "completion": "b", "label": label}) for n, label in enumerate(labels)]


def test_words_and_numbers_of_a_label_are_judgements() -> None:
    good, bad = (
        (True, "true", "True", "yes", "YES ", "1", "good", 1, 1.0),
        (False, "false", "no", "0", "bad", -1, 0, "-1"),
    )
    examples = [example for example in examples_of(labelled(*good, *bad)) if isinstance(example, Judged)]
    assert [example.good for example in examples] == [True] * len(good) + [False] * len(bad)


@pytest.mark.parametrize("label", ["maybe", None, 2, "", float("nan"), []])
@pytest.mark.parametrize("before", [0, 1, 2])
@pytest.mark.parametrize("shape", ["completion", "messages", "instruction"])
def test_a_label_that_is_no_judgement_among_others_is_a_bad_row(label: Any, before: int, shape: str) -> None:
    labels: list[Any] = [True, False, True]
    labels.insert(before, label)
    parts: dict[str, dict[str, Any]] = {
        "completion": {"prompt": "a", "completion": "b"},
        "messages": {"messages": [Q, A]},
        "instruction": {"instruction": "a", "output": "b"},
    }
    rows = [("row", {**parts[shape], "label": value}) for value in labels]
    found = list(examples_of(rows))
    kinds = [example.kind if isinstance(example, BadRow) else type(example) for example in found]
    assert kinds == [*[Judged] * before, "label is no judgement", *[Judged] * (3 - before)]
    assert "write true or false" in str(found[before])


def test_labels_that_are_classes_are_left_alone() -> None:
    for labels in (("sports", "world"), (2, 3, None), ("neutral", "maybe")):
        assert [type(example) for example in examples_of(labelled(*labels))] == [Completion] * len(labels)
    rows = [*labelled("sports", True), ("row", {"text": "t", "label": "sports"})]
    assert [type(row) for row in examples_of(rows)] == [BadRow, Judged, Text]
    assert [type(row) for row in examples_of(rows[:2], format="completion")] == [Completion] * 2
