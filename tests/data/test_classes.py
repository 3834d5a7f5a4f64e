"""Rows for classification: what is a text, a pair and a label, and how they become tokens and numbers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from halfbyte import hf
from halfbyte.data import BadRow, DataOptions, prepare
from halfbyte.data.classes import Classes, Labelled, LabelledRows, labelled_of
from halfbyte.data.prepared import Prepared
from halfbyte.data.task_survey import survey_task
from halfbyte.errors import InputError


def read(row: Any, **options: Any) -> Any:
    [example] = labelled_of([("row 1", row)], **options)
    return example


@pytest.mark.parametrize(
    ("row", "text", "pair", "label"),
    [
        ({"text": "a", "label": "x"}, "a", None, "x"),
        ({"sentence": "a", "label": 1, "idx": 3}, "a", None, 1),  # CoLA, SST-2
        ({"sentence1": "a", "sentence2": "b", "label": 0, "idx": 3}, "a", "b", 0),  # MRPC, RTE, WNLI
        ({"question1": "a", "question2": "b", "label": 0}, "a", "b", 0),  # QQP
        ({"question": "a", "sentence": "b", "label": 0}, "a", "b", 0),  # QNLI
        ({"premise": "a", "hypothesis": "b", "label": 2}, "a", "b", 2),  # MNLI
        ({"Text": "a", "Class": " x "}, "a", None, "x"),
        ({"review": "a", "sentiment": "good"}, "a", None, "good"),
        ({"text": "a", "label": "07"}, "a", None, 7),
        ({"text": "a", "label": 2.0}, "a", None, 2),
        ({"text": "a", "label": "2.0"}, "a", None, 2),
        ({"text": "a", "label": True}, "a", None, "true"),
        ({"sentence1": "a", "sentence2": None, "text": "c", "label": "x"}, "c", None, "x"),
    ],
)
def test_a_row_s_text_pair_and_label_are_found_by_their_columns(row: Any, text: str, pair: str, label: Any) -> None:
    found = read(row)
    assert (found.text, found.pair, found.label) == (text, pair, label)


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"text": "a"}, "row 1 has the columns text, and none of them is a label"),
        ({"label": "a", "x": 1}, "has the columns label and x, and none of them is a text to classify"),
        ({"text": "a", "label": None}, "label is empty"),
        ({"text": "a", "label": " "}, "label is empty"),
        ({"text": "a", "label": -1}, "label is -1, which stands for no label"),
        ({"text": "a", "label": 0.5}, r"label is 0.5, which is no class; scores \(regression\)"),
        ({"text": "a", "label": ["x", "y"]}, r'label is \["x", "y"\]; it must be one name or number'),
        ({"text": " ", "label": "x"}, "text is empty"),
        ([1], "is not an object with named columns"),
    ],
)
def test_a_row_that_cannot_be_trained_on_says_why(row: Any, sentence: str) -> None:
    found = read(row)
    assert isinstance(found, BadRow)
    with pytest.raises(BadRow, match=sentence):
        raise found


def test_columns_and_a_template_of_one_s_own() -> None:
    row = {"Kopf": "a", "Rumpf": "b", "Art": "x", "text": "no"}
    assert read(row, columns={"text": "Rumpf", "label": "Art"}).text == "b"
    assert read(row, columns={"text": "Kopf", "text_pair": "Rumpf", "label": "Art"}).pair == "b"
    assert read(row, columns={"label": "Art"}, template="{Kopf}: {Rumpf}").text == "a: b"
    with pytest.raises(InputError, match=r"columns names 'labl' .did you mean 'label'"):
        read(row, columns={"labl": "Art"})


def classes_of(*labels: Any) -> Classes:
    classes = Classes()
    for number, label in enumerate(labels):
        classes.add(Labelled(f"row {number}", "a", None, label))
    return classes


def test_numbers_are_ordered_as_numbers_names_as_names_and_a_model_s_own_order_wins() -> None:
    assert classes_of(10, 9, 0, 9).names() == ["0", "9", "10"]
    assert classes_of("b", "a", "b").names() == ["a", "b"]
    assert classes_of("b", "a", "b").names(["b", "a"]) == ["b", "a"]
    assert classes_of("b", "a", "b").names(["b", "c"]) == ["a", "b"]


def test_an_empty_cell_is_told_by_the_column_and_what_it_was_named_as() -> None:
    columns = {"text": "review", "label": "stars"}
    rows = [("row 1", {"review": "good", "stars": ""}), ("row 2", {"review": " ", "stars": "5"})]
    bad = [str(row) for row in labelled_of(rows, columns=columns)]
    assert bad[0].startswith("row 1: 'stars' (named as the label) is empty")
    assert bad[1].startswith("row 2: 'review' (named as the text) is empty")


def test_labels_of_two_kinds_of_one_class_and_without_end_are_refused() -> None:
    with pytest.raises(InputError, match=r"names in some rows \(row 1: 'x'\) and numbers in others \(row 0: 1\)"):
        classes_of(1, "x")
    with pytest.raises(InputError, match="All 2 rows have the label 'x'"):
        classes_of("x", "x").names()
    with pytest.raises(InputError, match="30 different labels in 30 rows, such as '0x'"):
        classes_of(*(f"{i}x" for i in range(30))).names()


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_tokens_are_the_tokenizer_s_own_cut_by_its_own_rules(family: str, task_folder: Callable[[str], Path]) -> None:
    tokenizer = hf.load_tokenizer(task_folder(family))
    rows = LabelledRows(tokenizer, 12)
    rows.names = ["x", "y"]
    examples = [
        Labelled("1", "short", None, "y"),
        Labelled("2", "a pair", "of texts that is long", "x"),
        Labelled("3", "a text that is far too long", None, "x"),
        BadRow("4", "kind", "is bad."),
        Labelled("5", "é", "ü", "x"),
    ]
    found = list(rows.encode(examples))
    for one, example in zip(found, examples, strict=True):
        if isinstance(example, BadRow):
            assert one.bad is example and not one.rows
            continue
        whole = tokenizer(example.text, example.pair)
        wanted = tokenizer(example.text, example.pair, truncation=True, max_length=12)
        [row] = one.rows
        for name in wanted.keys() - {"attention_mask"}:
            assert row[name].tolist() == wanted[name]
        assert ("token_type_ids" in row) == (family == "bert")
        assert row["labels"].tolist() == [rows.names.index(str(example.label))]
        assert one.truncated == (len(whole["input_ids"]) > 12) and one.lengths == (len(whole["input_ids"]),)
    assert [one.truncated for one in found] == [False, True, True, False, False]


def test_control_tokens_in_a_text_are_text_unless_they_are_to_be_read(task_folder: Callable[[str], Path]) -> None:
    tokenizer = hf.load_tokenizer(task_folder("bert"))
    [end] = tokenizer("</s>", add_special_tokens=False)["input_ids"]
    plain, _ = LabelledRows(tokenizer, 50).tokens("a </s> b", "</s>")
    read, _ = LabelledRows(tokenizer, 50, parse_special_tokens=True).tokens("a </s> b", "</s>")
    assert (plain["input_ids"].tolist().count(end), read["input_ids"].tolist().count(end)) == (2, 4)
    assert tokenizer.decode(plain["input_ids"]) == "a </s> b</s></s></s>"


def prepared(tokenizer: Any, folder: Path, rows: list[Any], **options: Any) -> Prepared:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return prepare(DataOptions(model="m", data=str(file), task="classify", **options), tokenizer)


def test_evaluation_rows_of_a_class_that_is_not_trained_are_bad(
    task_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    tokenizer = hf.load_tokenizer(task_folder("bert"))
    held_out = tmp_path / "held.csv"
    held_out.write_text("text,label\na,x\nb,z\n")
    rows = [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}]
    with pytest.raises(InputError, match="has the label 'z', which no row of the training data has"):
        prepared(tokenizer, tmp_path, rows, eval_data=str(held_out))
    data = prepared(tokenizer, tmp_path, rows, eval_data=str(held_out), skip_bad_rows="all")
    assert data.evaluation and data.evaluation.rows["reference"] == ["x"]
    assert data.classes == {"x": 1, "y": 1} and data.bad.total == 1


def test_the_survey_counts_classes_repetitions_and_contradictions(
    task_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    texts = [("a", 1), ("b", 0), ("a", 1), ("b", 1), ("b", 0), ("cc", 1)]
    rows = [{"text": text, "label": label} for text, label in texts]
    data = prepared(hf.load_tokenizer(task_folder("bert")), tmp_path, rows)
    found = survey_task(data, ["said"])
    assert (found.rows, found.repeated, found.contradicting) == (6, 3, 1)
    assert found.classes == {"0": 2, "1": 4} and found.tokens == {"50": 2, "90": 3, "99": 3, "100": 3}
    hints = " ".join(found.hints())
    assert "said" in hints and "Under 8 examples: 0, 1" in hints
    assert "Of 1 row the input has another answer in an earlier row" in hints
