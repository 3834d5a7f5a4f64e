"""What a run is watched by: figures of evaluations, samples, early stopping, the best adapter, loggers, forgetting."""

import json
import math
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import halfbyte
from halfbyte import data, hf
from halfbyte.errors import InputError
from halfbyte.evaluate.references import reference_scores
from halfbyte.generate import stream_reply
from halfbyte.runs.events import Checkpoint, End, Evaluation, Event, Note, Sample, Stage, StepMetrics
from halfbyte.runs.metrics import read_events
from halfbyte.train import Interrupted, TrainConfig, fine_tune

ANSWERS = ["yes", "no, never", "perhaps on Sunday", "ask again"]


def written(file: Path, answers: list[str], count: int = 13) -> str:
    """A file of so many questions of different lengths."""
    lines = [{"instruction": f"{'really ' * (i % 4)}{i}?", "output": answers[i % len(answers)]} for i in range(count)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(file)


@pytest.fixture
def options(tiny_model_folder: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "model": str(tiny_model_folder),
        "data": written(tmp_path / "rows.jsonl", ANSWERS),
        "output": tmp_path / "run",
        "preset": "quick",
        "batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "max_new_tokens": 24,
    }


def dense(options: dict[str, Any], run: Path | None = None) -> Any:
    """The model in fp32 as transformers and PEFT have it, with the adapter of a run."""
    base = AutoModelForCausalLM.from_pretrained(options["model"], dtype=torch.float32)
    return (PeftModel.from_pretrained(base, run) if run else base).eval()


@torch.no_grad()
def likelihoods(model: Any, row: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of the labelled tokens of a row, and these; by the plain formula."""
    ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
    logits = model(input_ids=ids).logits[0, :-1][labels != -100].double()
    labels = labels[labels != -100]
    return logits, labels, -logits.log_softmax(-1)[torch.arange(len(labels)), labels]


def events_of(run: Path, kind: type[Event]) -> list[Any]:
    return [event for event in read_events(run / "metrics.jsonl") if isinstance(event, kind)]


def adapters_equal(one: Path, other: Path) -> bool:
    tensors = [load_file(run / "adapter_model.safetensors") for run in (one, other)]
    return tensors[0].keys() == tensors[1].keys() and all(
        torch.equal(tensors[0][key], tensors[1][key]) for key in tensors[0]
    )


def test_figures_are_those_of_plain_formulas_on_a_dense_model_before_and_after(options: dict[str, Any]) -> None:
    options |= {"quant_type": "none", "compute_dtype": "float32", "optimizer": "adamw_torch"}
    options |= {"eval_data": options["data"], "eval_steps": 1000, "max_steps": 50, "lora_alpha": 64}
    options |= {"forgetting_data": "builtin"}
    run = fine_tune(TrainConfig(**options))
    before, after = events_of(run.output, Evaluation)
    assert (before.step, after.step) == (0, 50)
    tokenizer = hf.load_tokenizer(options["model"])
    rows = data.tokenize(data.read_examples(options["data"]), tokenizer, 512).rows.to_list()
    for told, model in ((before, dense(options)), (after, dense(options, run.output))):
        parts = [likelihoods(model, row) for row in rows]
        loss = float(torch.cat([nll for _, _, nll in parts]).mean())
        right = torch.cat([logits.argmax(-1) == labels for logits, labels, _ in parts]).double().mean()
        assert told.figures["loss"] == pytest.approx(loss, rel=1e-5)
        assert told.figures["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
        assert told.figures["token_accuracy"] == pytest.approx(float(right), abs=1e-7)  # of fp32 means
        firsts = torch.tensor(sorted({int(labels[0]) for _, labels, _ in parts}))
        chosen = [int(firsts[logits[0, firsts].argmax()]) == int(labels[0]) for logits, labels, _ in parts]
        assert told.figures["accuracy"] == sum(chosen) / len(chosen)
        texts = []
        for row in rows:
            start = next(place for place, label in enumerate(row["labels"]) if label != -100)
            ids = torch.tensor([row["input_ids"][:start]])
            stop = tokenizer.eos_token_id
            out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False,
                                 max_new_tokens=24, eos_token_id=stop, pad_token_id=stop)  # fmt: skip
            texts.append(tokenizer.decode(out[0, start:], skip_special_tokens=True))
        scores = reference_scores(texts, [ANSWERS[i % 4] for i in range(13)])
        assert {name: told.figures[name] for name in scores} == pytest.approx(scores)
        general = [
            likelihoods(model, row)[2] for row in general_rows_by_hand(tokenizer, 256) if len(row["input_ids"]) > 1
        ]
        assert told.figures["general_loss"] == pytest.approx(float(torch.cat(general).mean()), rel=1e-5)
    assert 0 < before.figures["accuracy"] < 1 or 0 < after.figures["accuracy"] < 1
    assert after.figures["rouge_l"] > before.figures["rouge_l"] + 0.1
    summary = json.loads((run.output / "summary.json").read_text())
    assert summary["evaluation_before"] == before.figures and summary["evaluation"] == after.figures
    assert (summary["evaluation_best"], summary["best_step"], summary["adapter_step"]) == (after.figures, 50, 50)


def general_rows_by_hand(tokenizer: Any, length: int) -> list[dict[str, Any]]:
    """The passages one behind the other, each with its end, in blocks that begin with the last token before them."""
    text = (Path(halfbyte.__file__).parent / "evaluate" / "general.txt").read_text().strip()
    ids: list[int] = []
    trained: list[bool] = []
    for passage in text.split("\n\n----\n\n"):
        own = [*tokenizer(passage)["input_ids"], tokenizer.eos_token_id]
        ids += own
        trained += [False] + [True] * (len(own) - 1)
    rows, start = [], 0
    while start < len(ids) - 1 and len(rows) < 64:
        block = slice(start, start + length)
        labels = [t if on else -100 for t, on in zip(ids[block], trained[block], strict=True)]
        rows.append({"input_ids": ids[block], "labels": [-100, *labels[1:]]})
        start += length - 1
    return rows


@pytest.mark.parametrize("evaluated", [pytest.param(True, marks=pytest.mark.slow), False])
def test_what_is_watched_changes_no_bit_of_what_is_trained(
    evaluated: bool, options: dict[str, Any], tmp_path: Path
) -> None:
    options |= {"lora_dropout": 0.1, "epochs": 1}
    plain = fine_tune(TrainConfig(**(options | {"output": tmp_path / "plain", "sample_prompts": []})))
    options |= {"eval_steps": 1, "forgetting_data": "builtin", "sample_prompts": ["why?", "who is it?"]}
    options |= {"eval_data": options["data"]} if evaluated else {}
    watched = fine_tune(TrainConfig(**options))
    assert adapters_equal(plain.output, watched.output)
    assert not events_of(plain.output, Sample) and not events_of(plain.output, Evaluation)
    evaluations = events_of(watched.output, Evaluation)
    assert [event.step for event in evaluations] == [0, 1, 2, 3, 4]
    assert all(("general_loss" in event.figures) and ("loss" in event.figures) == evaluated for event in evaluations)
    samples = events_of(watched.output, Sample)
    assert [(event.step, event.prompt) for event in samples] == [
        (step, prompt) for step in range(5) for prompt in ("why?", "who is it?")
    ]
    tokenizer, model = hf.load_tokenizer(watched.output), halfbyte.load(watched.output)
    chat = [{"role": "user", "content": "why?"}]
    assert samples[-2].answer == "".join(stream_reply(model, tokenizer, chat, max_new_tokens=24))


def test_samples_are_those_of_held_out_rows_or_else_of_the_first_rows_and_shown_as_asked(
    options: dict[str, Any], tmp_path: Path
) -> None:
    run = fine_tune(TrainConfig(**options, max_steps=1))
    samples = events_of(run.output, Sample)
    assert [event.step for event in samples] == [0, 0, 0, 1, 1, 1]
    assert [event.prompt for event in samples[:3]] == ["0?", "really 1?", "really really 2?"]
    other = written(tmp_path / "other.jsonl", ["so"], 2)
    options |= {"eval_data": other, "output": tmp_path / "other"}
    run = fine_tune(TrainConfig(**options, max_steps=1))
    assert [event.prompt for event in events_of(run.output, Sample)] == ["0?", "really 1?"] * 2


def worsening(options: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """A run whose held-out rows have nothing of what it is trained on."""
    other = written(tmp_path / "other.jsonl", ["ZQXJKW"], 5)
    options = options | {"eval_data": other, "eval_steps": 1, "epochs": 10, "learning_rate": 2e-2}
    return options | {"eval_samples": 0, "sample_prompts": []}


def test_a_run_stops_early_at_the_same_step_when_it_is_resumed_and_leaves_the_best_adapter(
    options: dict[str, Any], tmp_path: Path
) -> None:
    options = worsening(options, tmp_path) | {"early_stopping_patience": 3, "lora_dropout": 0.1, "save_steps": 2}
    saved: dict[int, Path] = {}

    def keep(event: Event) -> None:
        if isinstance(event, Checkpoint):
            saved[event.step] = tmp_path / f"saved-{event.step}"
            shutil.copytree(tmp_path / "whole" / event.folder, saved[event.step])

    whole = fine_tune(TrainConfig(**(options | {"output": tmp_path / "whole"})), keep)
    evaluations = events_of(whole.output, Evaluation)
    best = min(evaluations[1:], key=lambda event: event.figures["loss"])
    last = evaluations[-1].step
    assert last == best.step + 3 < 40  # ten epochs are forty steps
    assert (whole.summary.steps, whole.summary.best_step, whole.summary.adapter_step) == (last, best.step, best.step)
    assert whole.summary.evaluation_best == best.figures
    assert adapters_equal(whole.output, saved[best.step])
    assert events_of(whole.output, End) == [End(step=last, reason="finished")]
    notes = [event.text for event in events_of(whole.output, Note)]
    assert any(f"Stopped early after step {last} of 40" in note and f"step {best.step} " in note for note in notes)

    def interrupt(event: Event) -> None:
        if isinstance(event, StepMetrics) and event.step == last - 2:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        fine_tune(TrainConfig(**options), interrupt)

    def fail(event: Event) -> None:
        if isinstance(event, Evaluation) and event.step == last:
            raise RuntimeError("the machine is gone")

    with pytest.raises(RuntimeError, match="machine is gone"):
        fine_tune(TrainConfig(**options, resume=True), fail)
    resumed = fine_tune(TrainConfig(**options, resume=True))
    assert adapters_equal(whole.output, resumed.output)
    assert events_of(resumed.output, Evaluation) == evaluations
    assert resumed.summary.steps == last


def test_a_run_that_was_killed_as_it_stopped_early_makes_no_further_step(
    options: dict[str, Any], tmp_path: Path
) -> None:
    options = worsening(options, tmp_path) | {"early_stopping_patience": 2, "save_steps": 1}
    whole = fine_tune(TrainConfig(**(options | {"output": tmp_path / "whole"})))

    def fail(event: Event) -> None:
        if isinstance(event, Checkpoint) and event.step == whole.summary.steps:
            raise RuntimeError("the machine is gone")

    with pytest.raises(RuntimeError, match="machine is gone"):
        fine_tune(TrainConfig(**options), fail)
    resumed = fine_tune(TrainConfig(**options, resume=True))
    assert resumed.summary.steps == whole.summary.steps
    assert events_of(resumed.output, Evaluation) == events_of(whole.output, Evaluation)
    assert adapters_equal(whole.output, resumed.output)


def test_the_best_by_another_figure_is_kept_beyond_the_last_two_checkpoints(
    options: dict[str, Any], tmp_path: Path
) -> None:
    options = worsening(options, tmp_path) | {"epochs": 3, "keep_best": True, "metric_for_best": "token_accuracy"}
    run = fine_tune(TrainConfig(**options))
    evaluations = events_of(run.output, Evaluation)[1:]
    best = max(evaluations, key=lambda event: event.figures["token_accuracy"])  # the first of equal ones
    assert run.summary.best_step == run.summary.adapter_step == best.step
    assert run.summary.steps == 12
    tokenizer = hf.load_tokenizer(options["model"])
    rows = data.tokenize(data.read_examples(options["eval_data"]), tokenizer, 512).rows.to_list()
    parts = [likelihoods(halfbyte.load(run.output), row) for row in rows]
    right = torch.cat([logits.argmax(-1) == labels for logits, labels, _ in parts]).double().mean()
    assert float(right) == pytest.approx(best.figures["token_accuracy"], abs=0.03)  # evaluated in batches, in bf16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metric_for_best": "rouge"}, r"'rouge' is no figure .* \(did you mean 'rouge_l'\?\)"),
        ({"forgetting_data": "/nowhere.txt"}, "/nowhere.txt"),
        ({"sample_prompts": ["long " * 80]}, "is 4.. tokens long, but the model attends to 256"),
    ],
)
def test_what_cannot_be_watched_is_one_sentence_and_leaves_no_folder(
    changes: dict[str, Any], message: str, options: dict[str, Any]
) -> None:
    options |= {"eval_data": options["data"], "max_steps": 1}
    heard: list[Event] = []
    with pytest.raises(InputError, match=message):
        fine_tune(TrainConfig(**(options | changes)), heard.append)
    assert not options["output"].exists()
    if "forgetting_data" in changes:  # a large model takes minutes to load
        assert not [event for event in heard if isinstance(event, Stage) and event.name == "model"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"report_to": "tensorbord"}, r"did you mean 'tensorboard'\?"),
        ({"early_stopping_patience": 2}, "early_stopping_patience goes by evaluations"),
        ({"keep_best": True}, "keep_best goes by evaluations"),
        ({"early_stopping_threshold": 0.1}, "says nothing without early_stopping_patience"),
        ({"sample_prompts": "nowhere.txt"}, "text file with a prompt a line"),
        ({"sample_prompts": ["a", " "]}, "no empty prompt"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau", "metric_for_best": "accuracy"}, "goes by the loss"),
    ],
)
def test_options_that_say_nothing_are_refused(changes: dict[str, Any], message: str, options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=message):
        TrainConfig.from_yaml(None, options | changes)


def test_prompts_come_from_a_file_and_stand_in_the_configuration(options: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("Who?\n\nWhat for?\n")
    config = TrainConfig(**options, sample_prompts=str(file))
    assert config.sample_prompts == ["Who?", "What for?"]
    assert TrainConfig(**options, sample_prompts="none").sample_prompts == []
    assert TrainConfig(**options, eval_share=0.1, early_stopping_patience=2).keep_best
    assert not TrainConfig(**options, eval_share=0.1, early_stopping_patience=2, keep_best=False).keep_best


def test_a_broken_base_shows_before_the_first_step(options: dict[str, Any], tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    model = AutoModelForCausalLM.from_pretrained(options["model"])
    with torch.no_grad():
        model.model.norm.weight.zero_()  # every logit is the same, and the first token the likeliest
    model.save_pretrained(broken)
    hf.load_tokenizer(options["model"]).save_pretrained(broken)
    heard: list[Event] = []
    fine_tune(TrainConfig(**(options | {"model": str(broken), "max_steps": 1})), heard.append)
    places = [i for i, e in enumerate(heard) if isinstance(e, Note) and "Before training the model answers" in e.text]
    first = next(i for i, e in enumerate(heard) if isinstance(e, StepMetrics))
    assert len(places) == 1 and places[0] < first
    assert "again and again: look at the base" in heard[places[0]].text  # type: ignore[attr-defined]


def test_an_evaluation_that_is_no_number_is_told_with_its_step_in_metrics_and_page(options: dict[str, Any]) -> None:
    """A step so long that the weights overflow, after which nothing is trained."""
    options |= {"eval_data": options["data"], "eval_samples": 0, "sample_prompts": [], "max_grad_norm": 0}
    run = fine_tune(TrainConfig(**options | {"learning_rate": 1e18, "max_steps": 1}))
    first, last = events_of(run.output, Evaluation)
    assert not first.not_finite and "loss" in last.not_finite and "loss" not in last.figures
    [note] = [event for event in events_of(run.output, Note) if event.trouble]
    assert note.step == 1 and "not finite" in note.text
    assert "After step 1: The evaluation" in (run.output / "report.html").read_text()
