"""A run that was ended and resumed is the uninterrupted one, byte for byte; it may get more steps, and says so."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from halfbyte.errors import InputError
from halfbyte.hf.trainers import SFTTrainer
from halfbyte.runs.config import TrainConfig
from halfbyte.runs.events import Event, Note, StepMetrics
from halfbyte.train import Interrupted, fine_tune, space
from halfbyte.train.saving import SaveByTime

WORDS = ["An apple", "The sea, mostly", "Four", "Five, if you insist", "Good day", "No", "A heron on Sunday", "Rome"]
ROWS: dict[str, Callable[[int], dict[str, Any]]] = {
    "sft": lambda i: {"instruction": f"{'really ' * (i % 4)}{i}?", "output": WORDS[i % 8]},
    "dpo": lambda i: {"prompt": f"{'really ' * (i % 4)}{i}?", "chosen": WORDS[i % 8], "rejected": WORDS[(i + 3) % 8]},
    "kto": lambda i: {"prompt": f"{'really ' * (i % 4)}{i}?", "completion": WORDS[i % 8], "label": i % 3 > 0},
    "classify": lambda i: {"sentence": f"{'really ' * (i % 4)}{i}?", "label": ("owl", "dog", "fish")[i % 3]},
    "seq2seq": lambda i: {"text": f"{'really ' * (i % 4)}{i}?", "target": WORDS[i % 8]},
}
TIMES = (
    "elapsed", "tokens_per_second", "seconds", "trained_tokens_per_second", "memory_bytes", "peak_memory_bytes",
    "foretold",
)  # fmt: skip


@pytest.fixture
def options(
    tiny_model_folder: Path, task_folder: Callable[[str], Path], tmp_path: Path
) -> Callable[..., dict[str, Any]]:
    """``options(task, **more)``: of a run over eleven rows, six in a step."""

    def of(task: str = "sft", **more: Any) -> dict[str, Any]:
        file = tmp_path / "rows.jsonl"
        make = ROWS["dpo" if task == "orpo" else task]
        file.write_text("".join(json.dumps(make(i)) + "\n" for i in range(11)))
        families = {"classify": "bert", "seq2seq": "t5"}
        model = task_folder(families[task]) if task in families else tiny_model_folder
        return {
            "model": str(model),
            "data": [str(file)],
            "task" if task in families else "method": task,
            "output": str(tmp_path / "run"),
            "preset": "quick",
            "rank": 4,
            "batch_size": 2,
            "gradient_accumulation_steps": 3,
            "learning_rate": 1e-2,
            "epochs": 3,
            "keep": 1,
            "memory": "64GiB",
        } | more

    return of


def train(options: dict[str, Any], *listeners: Callable[[Event], None], **more: Any) -> Path:
    return fine_tune(TrainConfig.from_yaml(None, options | more), *listeners).output


def told(run: Path, *more: Callable[[Event], None], **options: Any) -> list[str]:
    """Resume with what the folder holds, as ``halfbyte resume`` does; return what is said."""
    notes: list[str] = []
    config = TrainConfig.from_yaml(run / "config.yaml", {"output": run, "resume": True} | options)
    np.random.seed(99)
    torch.manual_seed(99)
    fine_tune(config, lambda event: notes.append(event.text) if isinstance(event, Note) else None, *more)
    return notes


def interrupt(options: dict[str, Any], after: int, **more: Any) -> Path:
    """Run to the checkpoint of step ``after``, which an interrupt has made."""

    def listen(event: Event) -> None:
        if isinstance(event, StepMetrics) and event.step == after - 1:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted) as stop:
        train(options, listen, **more)
    assert stop.value.step == after
    return stop.value.output


def lines(run: Path, *kinds: str) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl but for times, read without our own reader."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in found if line["kind"] in kinds]


def assert_same(run: Path, whole: Path, *, ended: int | None = None) -> None:
    """Compare bytes and metrics; a run that had ``ended`` at a step shows what it answers there, too."""
    saved, expected = ({path.name for path in (folder / "checkpoints").iterdir()} for folder in (run, whole))
    assert saved == expected
    assert len(expected) in (1, 2)  # the last one, and the best one
    names = ["adapter_model.safetensors"]
    names += [f"checkpoints/{name}/state.{kind}" for name in expected for kind in ("json", "safetensors")]
    for name in names:
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name
    kinds = ("step", "evaluation", "sample")
    told_by_run = lines(run, *kinds)
    if ended is not None:
        at_its_end = [line for line in told_by_run if line["kind"] == "sample" and line["step"] == ended]
        assert at_its_end
        told_by_run = [line for line in told_by_run if line not in at_its_end]
    for one, other in zip(told_by_run, lines(whole, *kinds), strict=True):
        assert one.pop("figures", {}) == other.pop("figures", {})
        assert one == other
    ours, theirs = (json.loads((folder / "summary.json").read_text()) for folder in (run, whole))
    assert {k: v for k, v in ours.items() if k not in TIMES} == {k: v for k, v in theirs.items() if k not in TIMES}
    assert {p.name for p in run.iterdir()} == {p.name for p in whole.iterdir()}


CASES: dict[str, dict[str, Any]] = {
    "packing and dropout": {"packing": True, "lora_dropout": 0.1, "group_by_length": True},
    "padding, by length, weights": {"packing": False, "weights": True, "optimizer": "adamw_torch"},
    "8-bit state": {"optimizer": "adamw_8bit", "modules_to_save": "embed_tokens", "lora_dropout": 0.1},
    "paged 32-bit state": {"optimizer": "paged_adamw_32bit", "lr_scheduler_type": "cosine", "warmup_ratio": 0.3},
    "lion in 8 bits": {"optimizer": "paged_lion_8bit", "modules_to_save": "embed_tokens"},
    "adafactor": {"optimizer": "adafactor"},
    "neftune": {"neftune_noise_alpha": 5.0, "lora_dropout": 0.1},
    "evaluation": {"eval_share": 0.3, "eval_steps": 1, "epochs": 5, "keep_best": False, "lora_dropout": 0.1},
    "early stopping": {
        "eval_data": "other", "eval_steps": 1, "epochs": 10, "early_stopping_patience": 3, "lora_dropout": 0.1,
    },
    "replay": {"replay": 0.3, "lora_dropout": 0.1},
    "forgetting and references": {
        "eval_share": 0.3, "eval_steps": 1, "forgetting_data": "builtin", "sample_prompts": ["why?", "who is it?"],
        "max_new_tokens": 8, "lora_dropout": 0.1, "epochs": 5,
    },
    "plateau": {"eval_share": 0.3, "eval_steps": 1, "epochs": 5, "lr_scheduler_type": "reduce_lr_on_plateau"},
    "LoRA+": {"loraplus_lr_ratio": 4.0},
    "DoRA": {"use_dora": True, "lora_dropout": 0.1},
    "PiSSA": {"init_lora_weights": "pissa", "lora_dropout": 0.0},
    "blocks of text": {"task": "text", "max_length": 32},
    "dpo": {"task": "dpo", "lora_dropout": 0.1},
    "dpo over PiSSA": {"task": "dpo", "init_lora_weights": "pissa", "lora_dropout": 0.1},
    "kto": {"task": "kto"},
    "kto over PiSSA with embeddings": {
        "task": "kto", "init_lora_weights": "pissa", "lora_dropout": 0.0, "modules_to_save": "embed_tokens",
    },
    "orpo": {"task": "orpo", "lora_dropout": 0.1},
    "classify": {"task": "classify", "eval_share": 0.3, "lora_dropout": 0.1},
    "seq2seq": {"task": "seq2seq", "lora_dropout": 0.1},
}  # fmt: skip
QUICK = ("packing and dropout",)


@pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`")  # PEFT's, of a reference's copy
@pytest.mark.parametrize("case", [pytest.param(c, marks=() if c in QUICK else pytest.mark.slow) for c in CASES])
def test_twice_n_steps_are_n_an_end_and_n_more(case: str, options: Any, tmp_path: Path) -> None:
    more = dict(CASES[case])
    task, weights = more.pop("task", "sft"), more.pop("weights", False)
    if task == "text":
        ROWS["text"] = lambda i: {"text": f"{'really ' * (i % 4)}{WORDS[i % 8]}. " * 4}
    given = options(task, **more)
    if weights:
        (tmp_path / "more.jsonl").write_text((tmp_path / "rows.jsonl").read_text().replace("?", "!"))
        given["data"] = [f"{given['data'][0]}@0.6", f"{tmp_path / 'more.jsonl'}@1.5"]
    if "replay" in more:
        (tmp_path / "more.jsonl").write_text((tmp_path / "rows.jsonl").read_text().replace("?", "!"))
        given["replay"] = f"{tmp_path / 'more.jsonl'}*{more['replay']}"
    if more.get("eval_data"):  # what no row says that is trained on
        given["eval_data"] = str(tmp_path / "other.jsonl")
        (tmp_path / "other.jsonl").write_text(json.dumps({"instruction": "0?", "output": "~~~~ ~~~~"}) + "\n")
    whole = train(given, output=str(tmp_path / "whole"))
    steps = len(lines(whole, "step"))
    assert steps >= 4
    assert ("early_stopping_patience" in more) == (steps < lines(whole, "begin")[0]["total_steps"])
    run = interrupt(given, steps // 2)
    assert any("Going on from" in note for note in told(run))
    assert_same(run, whole)


@pytest.mark.slow
def test_an_end_within_an_accumulation_goes_back_to_the_checkpoint_before(
    options: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = options(save_steps=2, packing=False, lora_dropout=0.1)
    whole = train(given, output=str(tmp_path / "whole"))
    passes, real = [0], SFTTrainer.training_step

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        passes[0] += 1
        if passes[0] == 8:  # the second of three of step 3
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(SFTTrainer, "training_step", training_step)
        with pytest.raises(KeyboardInterrupt):
            train(given)
    run = Path(given["output"])
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-000002"]
    told(run)
    assert_same(run, whole)


@pytest.mark.slow
def test_a_run_that_was_killed_after_its_last_step_makes_no_other(
    options: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = options(max_steps=3, epochs=5, eval_share=0.3)  # the middle of an epoch
    whole = train(given, output=str(tmp_path / "whole"))
    with monkeypatch.context() as patch:
        patch.setattr("halfbyte.train.run._finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(given)
    run = Path(given["output"])
    assert not (run / "summary.json").exists()
    told(run)
    assert_same(run, whole)


def test_the_damaged_checkpoint_is_told_and_the_one_before_taken(options: Any, tmp_path: Path) -> None:
    given = options(save_steps=1, keep=2)
    whole = train(given, output=str(tmp_path / "whole"))
    run = interrupt(given, 4)
    file = run / "checkpoints/step-000004/state.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
    notes = told(run)
    assert (
        "Not to be gone on from: step-000004: state.safetensors is damaged; the checkpoint before it is taken" in notes
    )
    assert f"Going on from {run}/checkpoints/step-000003" in notes
    assert (run / "adapter_model.safetensors").read_bytes() == (whole / "adapter_model.safetensors").read_bytes()
    assert lines(run, "step") == lines(whole, "step")


@pytest.mark.slow
def test_a_flipped_bit_in_the_metrics_is_told_and_changes_nothing_that_is_trained(options: Any, tmp_path: Path) -> None:
    whole = train(options(), output=str(tmp_path / "whole"))
    run = interrupt(options(), 3)
    file = run / "metrics.jsonl"
    text = file.read_text()
    place = text.index('"loss":') + len('"loss":')
    file.write_text(text[:place] + chr(ord(text[place]) ^ 1) + text[place + 1 :])
    sentence = f"{file} is not as it was when step-000003 was saved: what can be read of it stays"
    assert any(note.startswith(sentence) for note in told(run))
    assert (run / "adapter_model.safetensors").read_bytes() == (whole / "adapter_model.safetensors").read_bytes()
    losses = [[line["loss"] for line in lines(folder, "step")] for folder in (run, whole)]
    assert [one == other for one, other in zip(*losses, strict=True)].count(False) == 1


@pytest.mark.slow
def test_a_damaged_checkpoint_takes_no_place_among_those_that_are_kept(options: Any) -> None:
    run = interrupt(options(save_steps=2, keep=2, max_steps=7), 5)
    (run / "checkpoints/step-000005/state.safetensors").write_bytes(b"")
    told(run)  # which comes to no step 5 checkpoint again
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"step-000006", "step-000007"}


@pytest.mark.slow
def test_a_finished_run_that_gets_more_steps_is_the_longer_run(options: Any, tmp_path: Path) -> None:
    given = options(lr_scheduler_type="constant", lora_dropout=0.1, max_steps=3)
    longer = train(given, output=str(tmp_path / "longer"), max_steps=7)
    run = train(given)
    [note] = [note for note in told(run, max_steps=7) if "was to have" in note]
    assert note == (
        "The run was to have 3 steps and has 7 now; 3 are made. Its schedule (constant) is laid out over all of them: "
        "the learning rate of step 4 is 0.01"
    )
    assert_same(run, longer, ended=3)
    assert json.loads((run / "run.json").read_text())["courses"] == [{"step": 3, "from": 3, "to": 7}]
    assert TrainConfig.from_yaml(run / "config.yaml").max_steps == 7
    with pytest.raises(InputError, match="holds a finished run; give it more max_steps or epochs"):
        told(run)


@pytest.mark.slow
def test_more_epochs_lay_the_schedule_out_anew(options: Any) -> None:
    given = options(lr_scheduler_type="linear", warmup_ratio=0.2, epochs=2)  # four steps, two in an epoch
    run = interrupt(given, 3)
    with pytest.raises(InputError, match="was to have 4 steps and cannot have 3"):
        told(run, max_steps=3)
    assert len(lines(run, "step")) == 3  # nothing has changed
    [note] = [note for note in told(run, epochs=5) if "was to have" in note]
    assert "from" not in note and "of step 4 would have been 0.00333 and is 0.00875" in note
    rates = [line["learning_rate"] for line in lines(run, "step")]
    # torch's LambdaLR by transformers' formula: up over ceil(0.2 n) steps, down to zero at n
    short = [s / 1 if s < 1 else (4 - s) / 3 for s in range(3)]
    long = [s / 2 if s < 2 else (10 - s) / 8 for s in range(3, 10)]
    assert rates == pytest.approx([1e-2 * share for share in short + long])


@pytest.mark.slow
def test_what_a_run_is_made_from_is_known_by_its_digest(options: Any, tmp_path: Path) -> None:
    template = tmp_path / "own.jinja"
    text = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}"
    template.write_text(text)
    given = options(chat_template=str(template), eval_data=[str(tmp_path / "rows.jsonl")])
    run = interrupt(given, 2)
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    template.write_text(text.replace("[", "<"))
    with pytest.raises(InputError, match=r"other training data \(.* → .*\) and other evaluation data .* tokenizer"):
        told(run)
    template.write_text(text + "{# the same #}")
    with pytest.raises(InputError, match=r"was made with another tokenizer or chat template \(\w{12} → \w{12}\)"):
        told(run)
    template.write_text(text)
    moved = tmp_path / "base"
    shutil.copytree(given["model"], moved)
    with pytest.raises(InputError, match=r"\(model: '.*' → '.*base'\)"):
        told(run, model=str(moved))
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before
    told(run)


@pytest.mark.slow
def test_save_steps_and_the_best_checkpoint_are_kept_as_a_resumed_run_is_told(options: Any) -> None:
    given = options(save_steps=5, eval_share=0.3, eval_steps=1, max_steps=8, learning_rate=1e-4)
    run = interrupt(given, 2)
    told(run, save_steps=1, keep=8)
    saved = {int(p.name.removeprefix("step-")) for p in (run / "checkpoints").iterdir()}
    assert saved == {2, 3, 4, 5, 6, 7, 8}


@pytest.mark.slow
def test_the_best_checkpoint_stays_beside_the_newest(options: Any, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"  # what no row of the training data says
    other.write_text(json.dumps({"instruction": "0?", "output": "~~~~ ~~~~ ~~~~"}) + "\n")
    given = options(save_steps=5, eval_data=[str(other)], eval_steps=1, max_steps=8, keep_best=True)
    run = train(given, lr_scheduler_type="constant", learning_rate=3e-2)
    losses = {line["step"]: line["figures"]["loss"] for line in lines(run, "evaluation") if line["step"]}
    best = min(losses, key=lambda step: losses[step])
    assert best < 5, losses
    assert {p.name for p in (run / "checkpoints").iterdir()} == {f"step-{best:06d}", "step-000008"}


def test_checkpoints_by_time_go_by_a_clock_that_nobody_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "time", lambda: 1e9 - 1e6 * now[0])  # runs backwards
    saving = SaveByTime(minutes=2)
    saves: list[float] = []
    saving.on_train_begin(None, None, None)
    for now[0] in (150.0, 219.0, 220.0, 230.0, 339.0, 341.0):
        control = type("Control", (), {"should_save": False})()
        saving.on_step_end(None, None, control)
        if control.should_save:
            saves.append(now[0])
            saving.on_save(None, None, control)
    assert saves == [220.0, 341.0]


def test_a_disk_without_room_for_the_checkpoints_is_told_before_the_first_step(
    options: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    given = options(save_steps=1, keep=3, optimizer="adamw_8bit", modules_to_save="embed_tokens", max_steps=4)
    whole = train(given)
    sizes = [sum(f.stat().st_size for f in folder.iterdir()) for folder in (whole / "checkpoints").iterdir()]
    adapter = (whole / "adapter_model.safetensors").stat().st_size
    shutil.rmtree(whole)
    size = r"[\d.]+ KiB"
    expected = rf"4 checkpoints of {size}, the adapter \({size}\) need {size} of disk, and {size} are free"
    steps: list[Event] = []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 0, 3 * max(sizes)))
    with pytest.raises(InputError, match=expected):
        train(given, steps.append)
    assert not any(isinstance(event, StepMetrics) for event in steps)
    assert not whole.exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 0, 4 * max(sizes) + 2 * adapter))
    train(given)


SIZED = ("adamw_8bit", "adamw_torch", "lion_8bit", "paged_adamw_32bit", "adagrad")


@pytest.mark.parametrize("optimizer", [SIZED[0], *(pytest.param(o, marks=pytest.mark.slow) for o in SIZED[1:])])
def test_the_size_of_a_checkpoint_is_known_beforehand(
    optimizer: str, options: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []
    monkeypatch.setattr(
        space, "check", lambda t, folder, *_: seen.append((space.adapter_bytes(t, folder), space.state_bytes(t)))
    )
    run = train(options(optimizer=optimizer, max_steps=1, modules_to_save="embed_tokens"))
    [folder] = (run / "checkpoints").iterdir()
    real = sum(f.stat().st_size for f in folder.iterdir())
    assert 0 <= real - sum(seen[0]) < 40_000  # headers, numbers, random states


@pytest.mark.slow
def test_one_command_resumes_and_says_where_there_is_nothing(options: Any, tmp_path: Path) -> None:
    run = interrupt(options(), 2)
    words = [sys.executable, "-m", "halfbyte", "resume"]
    done = subprocess.run([*words, str(run), "--keep", "2"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Going on from" in done.stderr and (run / "summary.json").exists()
    assert TrainConfig.from_yaml(run / "config.yaml").keep == 2
    assert load_file(run / "adapter_model.safetensors")
    done = subprocess.run([*words, str(tmp_path / "none")], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.endswith("none holds no run to go on with (config.yaml); name the folder of one.\n")
