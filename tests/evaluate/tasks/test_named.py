"""What a task is called, and what is wrong with one in a sentence, before a model is opened."""

import json
from pathlib import Path
from typing import Any

import pytest

from halfbyte.errors import InputError
from halfbyte.evaluate.tasks.rows import task_of

pytest.importorskip("lm_eval", reason="needs lm-eval (halfbyte[eval])")

from halfbyte.evaluate.tasks.named import load


def write(file: Path, rows: list[Any]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ({"question": "q", "choices": ["x", "y"], "answer": 1}, ("q", ["x", "y"], 1)),
        ({"question": "q", "choices": ["x", "y"], "answer": "B"}, ("q", ["x", "y"], 1)),
        ({"question": "q", "choices": ["x", "y"], "answer": "y"}, ("q", ["x", "y"], 1)),
        ({"question": "q", "choices": ["x", "y"], "answer": "1"}, ("q", ["x", "y"], 1)),
        ({"question": "q", "options": ["B", "A"], "answer": "A"}, ("q", ["B", "A"], 1)),
        (
            {"question": "q", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"},
            ("q", ["x", "y"], 1),
        ),
        ({"question": "q", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answer": 1}, ("q", ["x", "y"], 0)),
    ],
)
def test_an_answer_is_told_by_its_number_letter_label_or_text(row: Any, wanted: Any, tmp_path: Path) -> None:
    config = task_of(write(tmp_path / "mine.jsonl", [row, row]))
    [first, _] = config["custom_dataset"]()["test"]
    assert (first["question"], first["choices"], first["answer"]) == wanted
    assert config["task"] == "mine" and config["output_type"] == "multiple_choice"


def test_rows_of_training_are_questions_with_answers(tmp_path: Path) -> None:
    rows = [{"instruction": "do", "input": "it", "output": " done "}, {"prompt": "p", "completion": "c"}]
    config = task_of(write(tmp_path / "mine.jsonl", rows), write(tmp_path / "shots.jsonl", rows[:1]))
    splits = config["custom_dataset"]()
    assert list(splits["test"]) == [{"question": "do\n\nit", "answer": "done"}, {"question": "p", "answer": "c"}]
    assert len(splits["train"]) == 1 and config["fewshot_split"] == "train"


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        (
            [{"question": "q", "choices": ["x", "y"], "answer": "z"}],
            "has the answer 'z', which is none of its 2 choices",
        ),
        ([{"question": "q", "choices": ["x", "y"], "answer": 2}], "has the answer 2, which is none of its 2 choices"),
        ([{"question": "q", "choices": ["x", "y"]}], "has the answer None"),
        ([{"question": "q", "choices": ["x"], "answer": 0}], "has choices that is no list of two texts or more"),
        ([{"choices": ["x", "y"], "answer": 0}], "has choices and no question"),
        ([{"prompt": "p"}], "says no answer that should come"),
        ([{"apples": 1}], "row 1"),
        ([{"question": "q", "choices": ["x", "y"], "answer": 0}, {"prompt": "p", "completion": "c"}], "Some rows of"),
    ],
)
def test_rows_that_are_no_task_are_told(rows: Any, told: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=told):
        load([write(tmp_path / "rows.jsonl", rows)])


def test_several_tasks_are_named_with_commas_and_once(tmp_path: Path) -> None:
    one = write(tmp_path / "one.jsonl", [{"prompt": "p", "completion": "c"}])
    two = write(tmp_path / "two.jsonl", [{"question": "q", "choices": ["x", "y"], "answer": 1}])
    assert list(load([f"{one}, {two}", one])["tasks"]) == ["one", "two"]


YAML = """
task: mine
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{text}"
doc_to_choice: choices
doc_to_target: answer
{more}
"""


@pytest.mark.parametrize(
    ("text", "more", "told"),
    [
        ("{{question}}", "", None),
        ("{{question}}", "include: nowhere.yaml", r"cannot be loaded \(FileNotFoundError"),
        ("{{question}}", "output_type: guess", r"cannot be loaded \(ValueError: Got invalid output_type 'guess'"),
        ("{{question.nothing.more}}", "", r"cannot be loaded \(UndefinedError"),
        ("{{question}}", "num_fewshot: 3", r"cannot write its questions behind 3 solved ones \("),
        ("{{question}}", "unsafe_code: true", "runs code that the model writes"),
    ],
)
def test_a_task_of_ones_own(text: str, more: str, told: str | None, tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", [{"question": "q", "choices": ["x", "y"], "answer": 1}] * 2)
    path = tmp_path / "mine.yaml"
    path.write_text(YAML.format(file=file, text=text, more=more))
    if told is None:
        assert list(load([str(path)])["tasks"]) == ["mine"]
        return
    with pytest.raises(InputError, match=told) as error:
        load([str(path)])
    assert "\n" not in str(error.value)


def test_names_that_are_none_are_told_with_the_nearest(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", [{"prompt": "p", "completion": "c"}])
    cases = [
        (["arc_esay"], r"has no task 'arc_esay' \(did you mean 'arc_easy'\?\)"),
        ([str(tmp_path / "rowz.jsonl")], r"no file .*rowz.jsonl \(did you mean 'rows.jsonl'\?\) of a task"),
        ([str(tmp_path / "mine.yaml")], "no file .*mine.yaml"),
        ([" , "], "names no task"),
    ]
    for words, told in cases:
        with pytest.raises(InputError, match=told):
            load(words)
    with pytest.raises(InputError, match="--shots are solved examples"):
        load(["arc_easy"], shots="x.jsonl")


def test_data_on_the_hub_are_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.is_offline_mode", lambda: True)
    for name, data in (("arc_easy", "allenai/ai2_arc"), ("mmlu", "cais/mmlu")):
        with pytest.raises(
            InputError, match=rf"The task {name} cannot be loaded \(its data \({data}\) are not here, and "
        ):
            load([name])
