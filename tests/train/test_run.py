"""Whole runs on a tiny model: what they learn, what they leave behind, how they stop and go on."""

import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import halfbyte
from halfbyte import data, hf
from halfbyte.cli.console import TerminalDisplay
from halfbyte.errors import InputError
from halfbyte.memory import anonymous_memory
from halfbyte.nn import QuantizedLinear
from halfbyte.runs.events import Begin, End, Evaluation, Event, Note, Progress, StepMetrics
from halfbyte.runs.metrics import read_events
from halfbyte.train import Interrupted, TrainConfig, fine_tune
from halfbyte.train.build import _alike_together
from halfbyte.train.methods import METHODS

ANSWERS = ["yes", "no, never", "perhaps on Sunday", "ask again"]


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    """Thirteen questions of different lengths, four different answers."""
    file = tmp_path / "rows.jsonl"
    lines = [{"instruction": f"{'really ' * (i % 4)}{i}?", "output": ANSWERS[i % 4]} for i in range(13)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


@pytest.fixture
def options(tiny_model_folder: Path, rows_file: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "model": str(tiny_model_folder),
        "data": str(rows_file),
        "output": tmp_path / "run",
        "preset": "quick",
        "sample_prompts": [],
        "eval_samples": 0,
        "batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
    }


class Recorder:
    """Keeps what it is told, and interrupts the process after a step, as Ctrl-C or a scheduler would."""

    def __init__(
        self, interrupt_after: int | None = None, signals: Sequence[signal.Signals] = (signal.SIGINT,)
    ) -> None:
        self.interrupt_after = interrupt_after
        self.signals = signals
        self.begun: list[tuple[int, int]] = []
        self.steps: list[StepMetrics] = []
        self.ends: list[End] = []

    def __call__(self, event: Event) -> None:
        match event:
            case Begin(step=step, total_steps=total):
                self.begun.append((step, total))
            case StepMetrics(step=step):
                self.steps.append(event)
                if step == self.interrupt_after:
                    for number in self.signals:
                        os.kill(os.getpid(), number)
            case End():
                self.ends.append(event)


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of optimizer steps, read without our own reader."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "step"]


def data_loss(model: Any, rows: list[dict[str, list[int]]]) -> float:
    """transformers' own loss, over all rows in one batch."""
    with torch.no_grad():
        loss: torch.Tensor = model(**data.Collator(0)(rows)).loss
    return loss.item()


def test_a_run_memorises_its_data_and_its_adapter_opens_with_plain_peft(options: dict[str, Any]) -> None:
    options |= {"rank": 32, "lora_alpha": 64, "max_steps": 80, "optimizer": "adamw_torch"}
    options |= {"rank_pattern": {"[kv]_proj": 16}, "alpha_pattern": {"[kv]_proj": 32}}  # which are no larger
    recorder = Recorder()
    result = fine_tune(TrainConfig(**options), recorder)

    tokenizer = hf.load_tokenizer(options["model"])
    rows = data.tokenize(data.read_examples(options["data"]), tokenizer, 512)
    base = AutoModelForCausalLM.from_pretrained(options["model"])
    before = data_loss(base, rows.rows)
    after = data_loss(PeftModel.from_pretrained(base, result.output), rows.rows)
    ours = data_loss(halfbyte.load(result.output), rows.rows)
    assert before > 5  # log(258) is that of a model that knows nothing
    assert after < 0.5 * before
    assert ours == pytest.approx(after, rel=0.1)  # 4-bit base against 16-bit base

    steps = metrics(result.output)
    assert [step["step"] for step in steps] == list(range(1, 81))
    assert recorder.begun == [(0, 80)] and recorder.ends == [End(step=80, reason="finished")]
    assert [step.loss for step in recorder.steps] == [step["loss"] for step in steps]
    assert steps[0]["loss"] == pytest.approx(before, rel=0.1)
    epochs = 80 / 4  # 7 batches of at most 2 rows: 4 steps
    assert steps[-1]["epoch"] == epochs
    assert result.summary.trained_tokens == steps[-1]["trained_tokens"] == epochs * rows.counts.trained_tokens
    assert result.summary.loss == pytest.approx(sum(step["loss"] for step in steps[-10:]) / 10)
    assert json.loads((result.output / "summary.json").read_text()) == vars(result.summary)


def test_lora_weights_are_saved_in_fp32_under_pefts_names(options: dict[str, Any]) -> None:
    result = fine_tune(TrainConfig(**options, max_steps=1))
    tensors = load_file(result.output / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert len(tensors) == 2 * 2 * 7  # A and B of seven linear layers in each of two blocks, none in the head
    assert sum(tensor.numel() for tensor in tensors.values()) == result.summary.trained_parameters


def test_a_finished_run_folder_holds_its_results_and_nothing_else(options: dict[str, Any]) -> None:
    result = fine_tune(TrainConfig(**options, max_steps=2))
    assert {path.name for path in result.output.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "base_fingerprint.json",
        "chat_template.jinja",
        "config.yaml",
        "generation_config.json",
        "loss.png",
        "metrics.jsonl",
        "report.html",
        "run.json",
        "summary.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert (result.output / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert TrainConfig.from_yaml(result.output / "config.yaml") == TrainConfig(**options, max_steps=2)
    adapter = json.loads((result.output / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == options["model"]


def interrupt(options: dict[str, Any], after: int, **changes: Any) -> Path:
    """Run until the SIGINT that comes after step ``after - 1``, and return the checkpoint of step ``after``."""
    with pytest.raises(Interrupted) as stop:
        fine_tune(TrainConfig(**(options | changes)), Recorder(interrupt_after=after - 1))
    assert stop.value.step == after
    (folder,) = (stop.value.output / "checkpoints").glob(f"step-{after:06d}")
    return folder


@pytest.mark.parametrize("at", [4, 6])  # the end of the first epoch, the middle of the second
@pytest.mark.parametrize("optimizer", ["paged_adamw_8bit", "adamw_torch"])
def test_an_interrupted_and_resumed_run_is_bitwise_the_uninterrupted_one(
    optimizer: str, at: int, options: dict[str, Any], tmp_path: Path
) -> None:
    options |= {"lora_dropout": 0.1, "epochs": 3, "optimizer": optimizer}
    options |= {"modules_to_save": "embed_tokens"}  # 8-bit state from 4096 values
    whole = interrupt(options, 10, output=tmp_path / "whole")
    interrupt(options, at)
    random.seed(99)
    np.random.seed(99)
    torch.manual_seed(99)
    resumed = interrupt(options, 10, resume=True)

    for name in ("adapter_model.safetensors", "state.safetensors"):
        one, other = load_file(whole / name), load_file(resumed / name)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert (whole / "state.json").read_text() == (resumed / "state.json").read_text()
    dtypes = {tensor.dtype for tensor in load_file(whole / "state.safetensors").values()}
    assert dtypes == {torch.float32, torch.uint8}  # random state is uint8 in either case
    exact = ("step", "epoch", "loss", "learning_rate", "grad_norm", "trained_tokens")
    lines = [[{key: line[key] for key in exact} for line in metrics(run.parents[1])] for run in (whole, resumed)]
    assert lines[0] == lines[1]
    assert [line["step"] for line in lines[1]] == list(range(1, 11))
    elapsed = [line["elapsed"] for line in metrics(resumed.parents[1])]
    assert elapsed == sorted(elapsed)


@pytest.mark.parametrize("packing", [True, False])
def test_a_resumed_run_packs_as_it_was_begun_whatever_the_memory_is_by_then(
    options: dict[str, Any], tmp_path: Path, packing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    options |= {"lora_dropout": 0.1, "epochs": 2, "packing": packing}
    whole = fine_tune(TrainConfig(**(options | {"output": tmp_path / "whole"})))
    interrupt(options, 3)
    monkeypatch.setattr("halfbyte.train.run.plan_step", None)
    resumed = fine_tune(TrainConfig(**options, resume=True))
    one, other = (load_file(run.output / "adapter_model.safetensors") for run in (whole, resumed))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_evaluation_is_told_and_changes_nothing_of_what_is_trained(options: dict[str, Any], tmp_path: Path) -> None:
    options |= {"lora_dropout": 0.1, "epochs": 2, "save_steps": 3}
    plain = fine_tune(TrainConfig(**(options | {"output": tmp_path / "plain"})))
    options |= {"eval_data": options["data"], "eval_steps": 2}
    recorder = Recorder()
    whole = fine_tune(TrainConfig(**(options | {"output": tmp_path / "whole"})), recorder)
    interrupt(options, 4)
    resumed = fine_tune(TrainConfig(**options, resume=True))
    one, *others = (load_file(run.output / "adapter_model.safetensors") for run in (plain, whole, resumed))
    assert all(torch.equal(one[key], other[key]) for other in others for key in one)

    events = [
        [e for e in read_events(run.output / "metrics.jsonl") if isinstance(e, Evaluation)] for run in (whole, resumed)
    ]
    assert [event.step for event in events[0]] == [0, 2, 4, 6, 8]
    assert events[0] == events[1]
    tokenizer = hf.load_tokenizer(options["model"])
    rows = data.tokenize(data.read_examples(options["data"]), tokenizer, 512).rows
    assert events[0][0].figures["loss"] == pytest.approx(data_loss(halfbyte.load(options["model"]), rows), rel=5e-3)
    assert events[0][-1].figures["loss"] == pytest.approx(data_loss(halfbyte.load(whole.output), rows), rel=5e-3)


def test_a_resumed_run_finishes_like_any_other(options: dict[str, Any], tmp_path: Path) -> None:
    whole = fine_tune(TrainConfig(**(options | {"output": tmp_path / "whole"})))
    interrupt(options, 2)
    with (options["output"] / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 3, "epo')  # as a killed process may leave it
    recorder = Recorder()
    result = fine_tune(TrainConfig(**options, resume=True), recorder)
    assert recorder.begun == [(2, 4)]
    assert not (result.output / "checkpoints").exists()
    assert (result.summary.steps, result.summary.loss) == (whole.summary.steps, whole.summary.loss)
    assert result.summary.trained_tokens == whole.summary.trained_tokens
    one, other = (load_file(run.output / "adapter_model.safetensors") for run in (whole, result))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_resume_begins_where_there_is_nothing_to_go_on_from(options: dict[str, Any]) -> None:
    assert fine_tune(TrainConfig(**options, max_steps=1, resume=True)).summary.steps == 1


def test_a_run_without_a_checkpoint_is_begun_anew_and_says_so(options: dict[str, Any]) -> None:
    recorder = Recorder(interrupt_after=2, signals=[signal.SIGINT, signal.SIGINT])
    with pytest.raises(KeyboardInterrupt):
        fine_tune(TrainConfig(**options), recorder)
    heard: list[Event] = []
    result = fine_tune(TrainConfig(**options, resume=True), heard.append)
    told = f"{result.output} has no checkpoint to go on from, so the run begins anew; its 2 steps are made again"
    assert told in [event.text for event in heard if isinstance(event, Note)]
    assert result.summary.steps == 4


def test_an_interrupt_during_the_last_step_still_finishes(options: dict[str, Any]) -> None:
    assert fine_tune(TrainConfig(**options), Recorder(interrupt_after=3)).summary.steps == 4


def test_a_second_interrupt_stops_at_once_and_keeps_the_last_checkpoint(options: dict[str, Any]) -> None:
    before = signal.getsignal(signal.SIGINT)
    recorder = Recorder(interrupt_after=3, signals=[signal.SIGINT, signal.SIGINT])
    with pytest.raises(KeyboardInterrupt) as stop:
        fine_tune(TrainConfig(**options, save_steps=1), recorder)
    assert not isinstance(stop.value, Interrupted)
    assert recorder.ends == [End(step=3, reason="interrupted")]
    assert signal.getsignal(signal.SIGINT) is before
    assert sorted(path.name for path in (options["output"] / "checkpoints").iterdir()) == ["step-000001", "step-000002"]


def test_the_last_two_checkpoints_are_kept_and_each_is_a_peft_adapter(options: dict[str, Any]) -> None:
    folder = interrupt(options, 4, epochs=2, save_steps=1)
    assert sorted(path.name for path in folder.parent.iterdir()) == ["step-000003", "step-000004"]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(options["model"]), folder)
    assert model.peft_config["default"].r == 16


def test_nothing_is_pickled(options: dict[str, Any]) -> None:
    interrupt(options, 2)
    suffixes = {path.suffix for path in options["output"].rglob("*") if path.is_file()}
    assert suffixes == {".html", ".json", ".jinja", ".jsonl", ".safetensors", ".yaml"}
    for path in options["output"].rglob("*"):
        assert not path.is_file() or path.read_bytes()[:2] not in (b"PK", b"\x80\x02", b"\x80\x04", b"\x80\x05")


def test_a_folder_that_holds_a_run_is_refused_and_left_alone(options: dict[str, Any]) -> None:
    fine_tune(TrainConfig(**options, max_steps=1))
    before = {path.name: path.read_bytes() for path in options["output"].iterdir()}
    with pytest.raises(InputError, match="already holds a run; set resume or overwrite"):
        fine_tune(TrainConfig(**options, max_steps=2))
    with pytest.raises(InputError, match="holds a finished run"):
        fine_tune(TrainConfig(**options, max_steps=1, resume=True))
    with pytest.raises(InputError, match="is not there"):
        fine_tune(TrainConfig(**(options | {"data": "none.jsonl", "overwrite": True})))
    assert {path.name: path.read_bytes() for path in options["output"].iterdir()} == before
    assert fine_tune(TrainConfig(**options, max_steps=2, overwrite=True)).summary.steps == 2


def test_other_options_cannot_resume_a_run(options: dict[str, Any]) -> None:
    interrupt(options, 2)
    with pytest.raises(InputError, match=r"\(rank: 16 → 8\)"):
        fine_tune(TrainConfig(**options, rank=8, resume=True))


def test_other_data_cannot_resume_a_run(options: dict[str, Any], rows_file: Path) -> None:
    interrupt(options, 2)
    rows_file.write_text(rows_file.read_text().replace("never", "NEVER"))
    with pytest.raises(InputError, match="made with other training data"):
        fine_tune(TrainConfig(**options, resume=True))


def test_a_run_does_not_write_over_files_or_models(options: dict[str, Any], rows_file: Path) -> None:
    with pytest.raises(InputError, match="is a file"):
        fine_tune(TrainConfig(**(options | {"output": rows_file})))
    with pytest.raises(InputError, match="holds a model"):
        fine_tune(TrainConfig(**(options | {"output": options["model"], "overwrite": True})))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "/nowhere/model"}, "no folder /nowhere/model"),
        ({"target_modules": ["q_prok"]}, "q_prok"),
        ({"max_length": 8}, "max_length 8"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_no_folder(
    change: dict[str, Any], message: str, options: dict[str, Any]
) -> None:
    with pytest.raises(InputError, match=message):
        fine_tune(TrainConfig(**(options | change)))
    assert not options["output"].exists()


def test_an_adapter_is_not_trained_on(options: dict[str, Any], tmp_path: Path) -> None:
    fine_tune(TrainConfig(**options, max_steps=1))
    with pytest.raises(InputError, match="is an adapter; name its base model, and it as the adapter to train on from"):
        fine_tune(TrainConfig(**(options | {"model": str(options["output"]), "output": tmp_path / "other"})))


@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "int8"])
def test_a_run_is_opened_over_the_format_that_it_was_trained_over(options: dict[str, Any], quant_type: str) -> None:
    folder = fine_tune(TrainConfig(**options, quant_type=quant_type, max_steps=1)).output
    model = halfbyte.load(folder)
    formats = {module.quant_type for module in model.modules() if isinstance(module, QuantizedLinear)}
    assert formats == {quant_type}
    assert (folder / "base_format.json").exists() == (quant_type != "nf4")


def test_a_run_that_diverges_stops_before_its_weights_do(options: dict[str, Any]) -> None:
    options |= {"learning_rate": 1e20, "lr_scheduler_type": "constant", "epochs": 9, "save_steps": 1}
    told = (
        r"gradient of step \d+ is not finite.* on \S+rows.jsonl, row \d+ \(line \d+\).*lower learning_rate than 1e\+20"
    )
    with pytest.raises(InputError, match=told):
        fine_tune(TrainConfig(**options))
    assert "failed</span>" in (page := (options["output"] / "report.html").read_text())
    assert re.search(r"<li dir=\"auto\">The run failed after step \d+: Training diverged: the .*gradient of step", page)
    last = max((options["output"] / "checkpoints").iterdir())
    assert all(tensor.isfinite().all() for tensor in load_file(last / "adapter_model.safetensors").values())


def test_columns_that_are_not_used_are_told_and_the_data_as_it_is_read(
    options: dict[str, Any], rows_file: Path
) -> None:
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
    rows_file.write_text("".join(json.dumps(row | {"source": "s", "weight": 1}) + "\n" for row in rows))
    events: list[Event] = []
    fine_tune(TrainConfig(**options, max_steps=1), events.append)
    assert [event.text for event in events if isinstance(event, Note) and event.text.startswith("Column")] == [
        "Columns not used: source and weight"
    ]
    size = rows_file.stat().st_size
    assert Progress(done=size, total=size, unit="bytes") in events


def test_a_memory_budget_that_nothing_fits_in_is_refused_before_anything_is_written(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"may be used: it would fit with --memory [\d.]+GiB\."):
        fine_tune(TrainConfig(**options, memory="1MiB"))
    assert not options["output"].exists()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="by glibc")
def test_a_run_with_a_budget_gives_back_what_is_free_in_the_heap(options: dict[str, Any]) -> None:
    found: list[int] = []
    held: list[torch.Tensor] = []

    def tell(event: Event) -> None:
        if isinstance(event, StepMetrics):
            found.append(anonymous_memory())
            if event.step == 1:  # blocks too small for mappings of their own, free below one that is not
                blocks = [torch.ones(2**14) for _ in range(3000)]
                held.append(blocks[-1])
                del blocks
                found.append(anonymous_memory())

    fine_tune(TrainConfig(**options, memory=anonymous_memory() + 2**30, max_steps=2), tell)
    before, between, after = found
    assert between - before > 150 * 2**20
    assert after - before < 30 * 2**20


def test_gradient_checkpointing_changes_no_bit_of_the_result(options: dict[str, Any], tmp_path: Path) -> None:
    plain = fine_tune(TrainConfig(**options, max_steps=2, lora_dropout=0.1))
    options |= {"output": tmp_path / "checkpointed", "gradient_checkpointing": True}
    recomputed = fine_tune(TrainConfig(**options, max_steps=2, lora_dropout=0.1))
    one, other = (load_file(run.output / "adapter_model.safetensors") for run in (plain, recomputed))
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("constant", 0.0, [1, 1, 1, 1]),
        ("constant", 0.5, [0, 0.5, 1, 1]),
        ("linear", 0.0, [1, 0.75, 0.5, 0.25]),
    ],
)
def test_the_learning_rate_follows_its_schedule(
    schedule: str, warmup: float, expected: list[float], options: dict[str, Any]
) -> None:
    fine_tune(TrainConfig(**options, lr_scheduler_type=schedule, warmup_ratio=warmup))
    rates = [step["learning_rate"] for step in metrics(options["output"])]
    assert rates == pytest.approx([rate * options["learning_rate"] for rate in expected])


def test_the_terminal_shows_step_loss_and_rate(options: dict[str, Any]) -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=120)
    fine_tune(TrainConfig(**options, max_steps=2), TerminalDisplay(console))
    text = stream.getvalue()
    assert "13 examples" in text and "2/2" in text and "loss 5." in text and "trained tokens/s" in text


def test_without_a_terminal_there_are_plain_lines_and_no_other_noise(
    options: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    stream = io.StringIO()
    fine_tune(TrainConfig(**options, max_steps=2), TerminalDisplay(Console(file=stream)))
    lines = stream.getvalue().splitlines()
    assert lines[-2].startswith("step 2/2  loss 5.") and lines[-1].startswith("Foretold were")
    assert "\x1b" not in stream.getvalue()
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("unshare"), reason="needs unshare (util-linux) to make a small disk")
def test_a_full_disk_is_one_sentence_and_leaves_whole_files(options: dict[str, Any], tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    script = tmp_path / "script.py"
    script.write_text(
        "import json, sys; from pathlib import Path; from halfbyte.train import TrainConfig, fine_tune\n"
        "def fill(event):\n"
        "    try: event.kind == 'checkpoint' and Path(sys.argv[2], 'other').write_bytes(bytes(10**7))\n"
        "    except OSError: pass\n"
        "try: fine_tune(TrainConfig(**json.loads(sys.argv[1])), fill)\n"
        "except Exception as error: print(type(error).__name__, error)\n"
        "for file in sorted(Path(sys.argv[2]).rglob('*')): print(file.name, file.is_file() and file.stat().st_size)\n"
    )
    options |= {"output": str(disk / "run"), "save_steps": 1, "optimizer": "adamw_torch"}
    mount = 'mount -t tmpfs -o size=1500k none "$1" && exec "$2" "$3" "$4" "$1"'
    command = ["unshare", "-rm", "sh", "-c", mount, "sh", disk, sys.executable, script, json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no small disk to be had here: {done.stderr}")
    first, *files = done.stdout.splitlines()
    assert first.startswith("InputError") and "the disk is full" in first
    assert "step-000001 False" in files and not [line for line in files if ".part" in line]


@pytest.fixture
def experts_folder(request: pytest.FixtureRequest, tiny_model_folder: Path, tmp_path: Path) -> Path:
    """A saved mixture of experts of the class that the test names, with the tiny model's tokenizer."""
    folder = tmp_path / "experts"
    shutil.copytree(tiny_model_folder, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 2, "vocab_size": 258, "pad_token_id": 0}
    kind, more = request.param
    config = getattr(transformers, f"{kind}Config")(**sizes, bos_token_id=None, eos_token_id=1, **more)
    getattr(transformers, f"{kind.removesuffix('Text')}ForCausalLM")(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("experts_folder", [("Mixtral", {})], indirect=True)
def test_experts_are_trained_with_dropout_and_resumed(
    options: dict[str, Any], experts_folder: Path, tmp_path: Path
) -> None:
    options |= {"model": str(experts_folder), "max_steps": 4, "lora_dropout": 0.1}
    with pytest.raises(InputError, match="use_dora does not go with experts"):
        fine_tune(TrainConfig(**options, use_dora=True))
    with pytest.raises(InputError, match="adapters begin with zeros alone"):
        fine_tune(TrainConfig(**options, init_lora_weights="pissa"))
    notes: list[str] = []
    whole = fine_tune(TrainConfig(**options), lambda e: notes.append(e.text) if isinstance(e, Note) else None).output
    [share] = [note for note in notes if "in 4 bits" in note]
    model = halfbyte.load(experts_folder)
    assert f"{hf.share_in_4bit(model):.0%} of them in 4 bits" in share

    parts = options | {"output": str(tmp_path / "parts"), "save_steps": 1}
    with pytest.raises(Interrupted):
        fine_tune(TrainConfig(**parts), Recorder(interrupt_after=2))
    again = fine_tune(TrainConfig(**parts, resume=True)).output
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in (whole, again))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    steps = [event for event in read_events(whole / "metrics.jsonl") if isinstance(event, StepMetrics)]
    assert [step.figures["expert_load"] for step in steps] == [1.0] * 4  # each token goes to both experts
    moved = [name for name in one if ".experts." in name and "lora_B" in name]
    assert len(moved) == 2 * 2 and all(one[name].any() for name in moved)


SHARED = {"num_experts": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}


@pytest.mark.filterwarnings("ignore:lora with eva initialization used with low_cpu_mem_usage")
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")
@pytest.mark.parametrize("experts_folder", [("Qwen2Moe", SHARED | {"num_experts_per_tok": 2})], indirect=True)
def test_shared_experts_begin_with_eva_and_are_resumed(
    options: dict[str, Any], experts_folder: Path, tmp_path: Path
) -> None:
    options |= {"model": str(experts_folder), "init_lora_weights": "eva", "rank": 4, "lora_dropout": 0.0}
    options |= {"target_modules": "o_proj,shared_expert.gate_proj", "max_steps": 3}
    whole = fine_tune(TrainConfig(**options)).output
    parts = options | {"output": str(tmp_path / "parts"), "save_steps": 1}
    with pytest.raises(Interrupted):
        fine_tune(TrainConfig(**parts), Recorder(interrupt_after=1))
    again = fine_tune(TrainConfig(**parts, resume=True)).output
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in (whole, again))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert sum(".shared_expert.gate_proj.lora_A" in name for name in one) == 2
    opened = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(experts_folder), whole)
    assert sum(".shared_expert.gate_proj.lora_A" in name for name, _ in opened.named_parameters()) == 2


@pytest.mark.parametrize("experts_folder", [("Llama4Text", {"intermediate_size_mlp": 48})], indirect=True)
def test_experts_train_where_trl_cannot_balance_them(
    options: dict[str, Any], experts_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options |= {"model": str(experts_folder), "max_steps": 2}
    recorder = Recorder()
    fine_tune(TrainConfig(**options, lora_dropout=0.0), recorder)
    assert len(recorder.steps) == 2
    assert "without TRL's loss that balances them, which does not know Llama4TextConfig" in caplog.text


def test_rows_of_like_length_are_evaluated_together_where_a_mean_over_tokens_is_all_that_is_taken() -> None:
    rows = datasets.Dataset.from_list([{"input_ids": [0] * n, "number": i} for i, n in enumerate((2, 5, 1, 5, 3))])
    assert _alike_together(rows, METHODS["sft"])["number"][:] == [1, 3, 4, 0, 2]
    assert _alike_together(rows, METHODS["kto"]) is rows
