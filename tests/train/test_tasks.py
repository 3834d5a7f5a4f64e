"""Runs that train classifiers and sequence-to-sequence models: what they learn, leave behind, measure and refuse."""

import copy
import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding

import halfbyte
from halfbyte import data, hf
from halfbyte.data import DataOptions
from halfbyte.errors import InputError
from halfbyte.hf.models.heads import TASK_TYPES, head_names, modules_within
from halfbyte.hf.trainers import ClassifyConfig, ClassifyTrainer, Seq2SeqConfig, Seq2SeqTrainer
from halfbyte.hf.trainers.tasks import TaskCollator
from halfbyte.runs.events import Event, StepMetrics
from halfbyte.train import Interrupted, TrainConfig, fine_tune
from halfbyte.train.tasks import TASKS

CLASSES = ["dog", "fish", "owl"]
SAYS = {"dog": "wau", "fish": "blub blub", "owl": "hu"}


def write(file: Path, rows: list[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def rows_for(task: str) -> list[dict[str, Any]]:
    draw = random.Random(0)
    names = [draw.choice(CLASSES) for _ in range(22)]
    if task == "classify":
        return [{"sentence": f"{'very ' * (i % 3)}{SAYS[name]} {i}", "label": name} for i, name in enumerate(names)]
    return [{"text": f"{'the ' * (i % 3)}{name} {i}", "target": SAYS[name]} for i, name in enumerate(names)]


@pytest.fixture
def options(task_folder: Callable[[str], Path], tmp_path: Path) -> Callable[[str], dict[str, Any]]:
    def of(task: str) -> dict[str, Any]:
        return {
            "model": str(task_folder("roberta" if task == "classify" else "gated t5")),
            "task": task,
            "data": write(tmp_path / "rows.jsonl", rows_for(task)),
            "output": tmp_path / "run",
            "preset": "quick",
            "max_length": 64,
            "batch_size": 2,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-2,
        }

    return of


class Interrupt:
    """Interrupts the process after a step."""

    def __init__(self, after: int) -> None:
        self.after = after

    def __call__(self, event: Event) -> None:
        if isinstance(event, StepMetrics) and event.step == self.after:
            os.kill(os.getpid(), signal.SIGINT)


def lines(run: Path, kind: str) -> list[dict[str, Any]]:
    read = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in read if line["kind"] == kind]


def test_answers_end_where_padding_begins_without_a_pad_token_too(tiny_model_folder: Path) -> None:
    tokenizer = hf.load_tokenizer(tiny_model_folder)
    tokenizer.pad_token = None
    ids = np.array([[*tokenizer("a b").input_ids, -100, -100]])
    figures = TASKS["seq2seq"].measure(tokenizer)(SimpleNamespace(predictions=ids, label_ids=ids[:, :3]))
    assert figures == {"rouge_l": 1.0, "exact_match": 1.0}  # the same text, padded further


def without_dropout(model: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "without dropout"
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {name: 0.0 for name in config if "dropout" in name and name != "classifier_dropout"}
    config |= {"attention_probs_dropout_prob": 0.0} if "attention_probs_dropout_prob" in config else {}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(("task", "family"), [("classify", "roberta"), ("classify", "bert"), ("seq2seq", "t5")])
def test_losses_of_the_first_steps_are_those_of_plain_trainers_on_the_dense_model(
    task: Any, family: str, task_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """Ours takes two micro-batches a step, theirs one of all rows: of two it would add up the means (5.23)."""
    folder = without_dropout(task_folder(family), tmp_path)
    tokenizer = hf.load_tokenizer(folder)
    rows = rows_for(task)
    named = DataOptions(model=str(folder), data=write(tmp_path / "rows.jsonl", rows), task=task)
    table = data.prepare(named, tokenizer)
    base: Any = hf.load(
        folder,
        quantization_config=hf.HalfbyteConfig(compute_dtype=torch.float32),
        task=task,
        classes=[*table.classes] or None,
    )
    base.config.pad_token_id = 0
    dense = copy.deepcopy(base).dequantize(torch.float32).float()
    heads = head_names(base) if task == "classify" else []
    lora: Any = {"r": 8, "target_modules": "all-linear", "task_type": TASK_TYPES[task]}
    lora |= {"modules_to_save": heads or None, "exclude_modules": modules_within(base, heads) or None}
    models = []
    for model in (base, dense):
        torch.manual_seed(0)
        models.append(get_peft_model(model, LoraConfig(**lora)))
    arguments: Any = {
        "output_dir": str(tmp_path / "out"),
        "max_steps": 5,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "train_sampling_strategy": "sequential",
        "optim": "adamw_torch",
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
    }
    kinds: Any = {
        "classify": (ClassifyTrainer, ClassifyConfig, transformers.Trainer, transformers.TrainingArguments),
        "seq2seq": (
            Seq2SeqTrainer,
            Seq2SeqConfig,
            transformers.Seq2SeqTrainer,
            transformers.Seq2SeqTrainingArguments,
        ),
    }
    trainer, settings, their_trainer, their_settings = kinds[task]
    ours = trainer(
        model=models[0],
        args=settings(**arguments, per_device_train_batch_size=2, gradient_accumulation_steps=2),
        train_dataset=table.train.rows,
        data_collator=TaskCollator(models[0], 0),
        processing_class=tokenizer,
    )
    plain = table.train.rows.remove_columns("where")
    collator: Any = DataCollatorForSeq2Seq(tokenizer, models[1])
    if task == "classify":
        plain = plain.map(lambda row: {"labels": row["labels"][0]}, features=None, remove_columns=["labels"])
        collator = DataCollatorWithPadding(tokenizer)
    theirs = their_trainer(
        model=models[1],
        args=their_settings(**arguments, per_device_train_batch_size=4),
        train_dataset=plain,
        data_collator=collator,
        processing_class=tokenizer,
    )
    found = []
    for one in (ours, theirs):
        one.train()
        found.append([line["loss"] for line in one.state.log_history if "loss" in line])
    assert len(found[0]) == 5 and len(set(found[0])) == 5
    assert found[0] == pytest.approx(found[1], rel=0.01)


@pytest.mark.parametrize("task", ["classify", pytest.param("seq2seq", marks=pytest.mark.slow)])
def test_an_interrupted_and_resumed_run_is_bitwise_the_uninterrupted_one(
    task: str, options: Callable[[str], dict[str, Any]], tmp_path: Path
) -> None:
    given = options(task) | {"lora_dropout": 0.1, "epochs": 2, "eval_share": 0.3, "eval_steps": 4}
    whole = fine_tune(TrainConfig(**(given | {"output": tmp_path / "whole"})))
    torch.manual_seed(99)
    with pytest.raises(Interrupted):
        fine_tune(TrainConfig(**given), Interrupt(3))
    torch.manual_seed(77)
    resumed = fine_tune(TrainConfig(**given, resume=True))
    one, other = (load_file(run.output / "adapter_model.safetensors") for run in (whole, resumed))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert whole.summary.evaluation == resumed.summary.evaluation
    exact = ("step", "loss", "grad_norm", "trained_tokens")
    assert [[[line[key] for key in exact] for line in lines(run.output, "step")] for run in (whole,)] == [
        [[line[key] for key in exact] for line in lines(run.output, "step")] for run in (resumed,)
    ]
    assert lines(whole.output, "evaluation") == lines(resumed.output, "evaluation")
    assert not (resumed.output / "checkpoints").exists()


@pytest.mark.slow
def test_a_classifier_learns_its_rows_and_its_figures_are_those_of_its_answers(
    options: Callable[[str], dict[str, Any]],
) -> None:
    given = options("classify")
    given |= {"max_steps": 60, "eval_data": given["data"], "eval_steps": 1000, "rank": 32, "batch_size": 11}
    given |= {"gradient_accumulation_steps": 1}
    result = fine_tune(TrainConfig(**given))
    figures = result.summary.evaluation
    before, *_, last = lines(result.output, "evaluation")
    assert before["step"] == 0 and before["figures"]["accuracy"] < 0.7 < 0.95 < figures["accuracy"]
    assert last["step"] == result.summary.steps and last["figures"] == figures

    model, tokenizer = halfbyte.load(result.output), halfbyte.load_tokenizer(result.output)
    assert model.config.id2label == dict(enumerate(CLASSES))
    rows = rows_for("classify")
    named = [row for row in halfbyte.generate.classify_texts(model, tokenizer, [(r["sentence"], None) for r in rows])]
    right = [one.label == row["label"] for one, row in zip(named, rows, strict=True)]
    assert sum(right) / len(right) == pytest.approx(figures["accuracy"])
    surprise = [-torch.tensor(one.probabilities[row["label"]]).log() for one, row in zip(named, rows, strict=True)]
    assert float(sum(surprise)) / len(rows) == pytest.approx(figures["loss"], rel=0.03, abs=2e-3)
    assert result.summary.trained_tokens == 30 * len(rows)
    assert (result.output / "loss.png").is_file()


@pytest.mark.slow
def test_a_sequence_to_sequence_model_learns_to_answer_and_generates_in_evaluation(
    options: Callable[[str], dict[str, Any]], tmp_path: Path
) -> None:
    given = options("seq2seq")
    given |= {"max_steps": 100, "eval_data": given["data"], "eval_steps": 1000, "rank": 32, "batch_size": 11}
    given |= {"gradient_accumulation_steps": 1, "model": str(without_dropout(Path(given["model"]), tmp_path))}
    result = fine_tune(TrainConfig(**given))
    figures = result.summary.evaluation
    assert lines(result.output, "evaluation")[0]["figures"]["exact_match"] == 0.0
    model, tokenizer = halfbyte.load(result.output), halfbyte.load_tokenizer(result.output)
    rows = rows_for("seq2seq")
    answers = [
        "".join(halfbyte.generate.stream_reply(model, tokenizer, row["text"], max_new_tokens=20)) for row in rows
    ]
    right = sum(answer == row["target"] for answer, row in zip(answers, rows, strict=True)) / len(rows)
    assert right == pytest.approx(figures["exact_match"], abs=1.5 / len(rows)) and right > 0.5
    batch = tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")
    labels = tokenizer([row["target"] for row in rows], padding=True, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        loss = float(model(**batch, labels=labels.masked_fill(labels == 0, -100)).loss)
    assert loss == pytest.approx(figures["loss"], rel=0.05, abs=0.01)


def test_a_step_s_loss_is_the_mean_over_its_rows_however_they_are_divided(
    options: Callable[[str], dict[str, Any]], tmp_path: Path
) -> None:
    """Seven rows in micro-batches of two and of seven: the last micro-batch of the first run holds one row."""
    given = options("classify")
    given["model"] = str(without_dropout(Path(given["model"]), tmp_path))
    given["data"] = write(tmp_path / "seven.jsonl", rows_for("classify")[:7])
    given |= {"compute_dtype": "float32", "max_steps": 1, "overwrite": True}
    losses = []
    for size, passes in ((2, 4), (7, 1)):
        fine_tune(TrainConfig(**(given | {"batch_size": size, "gradient_accumulation_steps": passes})))
        losses.append(lines(given["output"], "step")[0])
    assert losses[0]["trained_tokens"] == losses[1]["trained_tokens"] == 7
    torch.testing.assert_close(losses[0]["loss"], losses[1]["loss"], rtol=1e-5, atol=1e-6)


def test_a_classifier_s_run_folder_can_be_overwritten_and_a_model_s_folder_cannot(
    options: Callable[[str], dict[str, Any]],
) -> None:
    given = options("classify") | {"max_steps": 1}
    fine_tune(TrainConfig(**given))
    assert json.loads((given["output"] / "config.json").read_text())["id2label"] == {
        "0": "dog",
        "1": "fish",
        "2": "owl",
    }
    with pytest.raises(InputError, match="already holds a run"):
        fine_tune(TrainConfig(**given))
    again = options("seq2seq") | {"max_steps": 1, "overwrite": True}
    fine_tune(TrainConfig(**again))
    assert not (given["output"] / "config.json").exists()
    with pytest.raises(InputError, match="holds a model; name another folder"):
        fine_tune(TrainConfig(**(again | {"output": Path(again["model"])})))


def test_a_classifier_goes_on_with_the_classes_that_it_knows_in_their_order(
    options: Callable[[str], dict[str, Any]], tmp_path: Path
) -> None:
    config = transformers.RobertaConfig.from_pretrained(options("classify")["model"])
    config.id2label, config.label2id = dict(enumerate(CLASSES[::-1])), {n: i for i, n in enumerate(CLASSES[::-1])}
    folder = tmp_path / "known"
    transformers.RobertaForSequenceClassification(config).save_pretrained(folder)
    hf.load_tokenizer(options("classify")["model"]).save_pretrained(folder)
    result = fine_tune(TrainConfig(**(options("classify") | {"model": str(folder), "max_steps": 1})))
    assert halfbyte.load(result.output).config.id2label == dict(enumerate(CLASSES[::-1]))


@pytest.mark.parametrize(
    ("task", "change", "sentence"),
    [
        ("classify", {"packing": True}, "option 'packing' says nothing to task classify; leave it out"),
        ("seq2seq", {"train_on": "last"}, "option 'train_on' says nothing to task seq2seq; leave it out"),
        ("classify", {"format": "alpaca"}, "option 'format' says nothing to task classify"),
        ("seq2seq", {"family": "llama"}, "is a llama model, which is not an encoder with a decoder"),
        ("lm", {"family": "t5"}, "is not a causal language model; set task to seq2seq or classify"),
        ("lm", {"family": "bert"}, "is not a causal language model; set task to classify"),
        ("classify", {"rows": [{"text": "a", "label": "x"}] * 4}, "All 4 rows have the label 'x'"),
        ("classify", {"rows": [{"prompt": "a", "completion": "x"}] * 4}, "none of them is a label; name it"),
        ("classify", {"rows": [{"text": "a", "label": None}] * 2}, "label is empty; fill it in"),
        ("seq2seq", {"rows": [{"text": "a", "label": "x"}] * 4}, "for a text and its label use task classify"),
        ("classify", {"max_length": 200}, "tokens long, but the model attends to 129: set max_length to 129"),
        ("classify", {"target_modules": "classifier"}, "."),
    ],
)
def test_bad_input_is_told_in_a_sentence_and_leaves_nothing(
    task: str,
    change: dict[str, Any],
    sentence: str,
    options: Callable[[str], dict[str, Any]],
    task_folder: Callable[[str], Path],
    tiny_model_folder: Path,
    tmp_path: Path,
) -> None:
    given = options("classify" if task == "lm" else task) | {"task": task}
    if family := change.pop("family", None):
        given["model"] = str(tiny_model_folder if family == "llama" else task_folder(family))
    if task == "lm":
        given["data"] = write(tmp_path / "lm.jsonl", [{"prompt": "a", "completion": "b"}] * 3)
    if rows := change.pop("rows", None):
        given["data"] = write(tmp_path / "bad.jsonl", rows)
    if "max_length" in change:
        given["data"] = write(tmp_path / "long.jsonl", [{"text": "a" * 150, "label": x} for x in "xy"])
    with pytest.raises(InputError, match=sentence):
        fine_tune(TrainConfig(**(given | change)))
    assert not Path(given["output"]).exists()
