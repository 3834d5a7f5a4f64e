"""The training benchmark at tiny sizes: that the sides do the same work, and what is reported of it."""

import dataclasses
import io
import json
import math
import mmap
import os
import threading
from collections.abc import Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from matplotlib.image import imread
from peft import LoraConfig, get_peft_model
from rich.console import Console
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import halfbyte
from halfbyte import data
from halfbyte.bench import process, shapes, train
from halfbyte.bench.parts import PARTS
from halfbyte.bench.report import Circumstances
from halfbyte.bench.stacks import OURS, PEERS, Failed, Imported, Job, Loaded, Peer, Step, serve
from halfbyte.bench.training_report import SideResult, TrainingReport, TrainingRow
from halfbyte.cli import app
from halfbyte.errors import InputError
from halfbyte.hf import load_tokenizer
from halfbyte.kernels import native

# hidden, inner, layers, heads, key/value heads, head size, vocabulary; rows of whole blocks, since bitsandbytes' CPU
# library reads others wrongly; no size is LoRA's rank
TINY = (128, 192, 2, 4, 2, 32, 300)
RANK = 6


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    """Leave the libraries' logging as it was: a side silences it."""
    before = transformers.logging.get_verbosity()
    yield
    transformers.logging.set_verbosity(before)
    transformers.logging.enable_progress_bar()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench") / "tiny-model"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(shapes.SHAPES, "tiny", TINY)
        shapes.write_model("tiny", folder)
    return folder


@pytest.fixture
def job(model: Path, tmp_path: Path) -> Job:
    made = Job(str(model), "", str(tmp_path / "run"), batch=2, length=24, rank=RANK, steps=4)
    return dataclasses.replace(made, data=str(train._write_rows(tmp_path / "rows.jsonl", made)))


def start(side: Any, job: Job) -> tuple[Connection, threading.Thread]:
    """A side in a thread of this process, its imports and loading done."""
    ours, theirs = Pipe()
    thread = threading.Thread(target=serve, args=(theirs,), daemon=True)
    thread.start()
    ours.send((side, job))
    assert ours.recv() == Imported()
    ours.send("load")
    loaded = ours.recv()
    assert isinstance(loaded, Loaded) and loaded.seconds > 0, loaded
    return ours, thread


def steps(connection: Connection, commands: list[str]) -> list[Step]:
    taken = []
    for command in commands:
        connection.send(command)
        taken.append(connection.recv())
        assert isinstance(taken[-1], Step), taken[-1]
    return taken


def losses(side: Any, job: Job) -> list[float]:
    connection, thread = start(side, job)
    found = [step.loss for step in steps(connection, ["step"] * 3)]
    connection.close()
    thread.join(20)
    assert not thread.is_alive()
    return found


def test_every_side_in_every_setting_has_the_same_losses(job: Job) -> None:
    ours = losses(OURS, job)
    assert ours[0] > ours[1] > ours[2]
    # Over the same 4-bit weights only roundings differ (those of bitsandbytes' second level among them)...
    for peer in PEERS["bitsandbytes"]:
        assert losses(peer, job) == pytest.approx(ours, rel=2e-3), peer
    # ... and over 16-bit weights what quantization changes.
    for peer in PEERS["lora16"]:
        assert losses(peer, job) == pytest.approx(ours, rel=2e-2), peer


def test_all_sides_begin_with_the_same_adapter(job: Job) -> None:
    connection, thread = start(OURS, dataclasses.replace(job, steps=1))
    steps(connection, ["step"])
    connection.send("step")  # there is none: the run ends and writes its adapter
    thread.join(20)
    # As long as B is zero A has no gradient, so after one step A is what it was in the beginning.
    ours = {k: v for k, v in load_file(Path(job.folder) / "adapter_model.safetensors").items() if "lora_A" in k}
    for peer in (PEERS["bitsandbytes"][0], PEERS["lora16"][0]):
        adapter, _ = peer._load(job)
        theirs = {k.replace(".default", ""): v for k, v in adapter.named_parameters() if "lora_A" in k}
        assert theirs.keys() == ours.keys() and len(ours) == 14
        assert all(torch.equal(theirs[key], ours[key]) for key in ours)


def test_every_row_is_as_long_as_asked_and_trained_throughout(job: Job) -> None:
    rows = data.tokenize(data.read_examples(job.data), load_tokenizer(job.model), job.length).rows
    assert [len(row["input_ids"]) for row in rows] == [24, 24]
    assert all(row["labels"][1:] == row["input_ids"][1:] for row in rows)
    assert rows[0] != rows[1]


@pytest.mark.skipif(not native.available() or native.tier() == "scalar", reason="no native products here")
def test_a_profiled_step_is_divided_among_the_parts(job: Job) -> None:
    functions = vars(native).copy()
    connection, thread = start(OURS, job)
    plain, profiled, after = steps(connection, ["step", "profile", "step"])
    connection.close()
    thread.join(20)
    assert plain.parts is None and after.parts is None and profiled.parts is not None
    assert tuple(profiled.parts) == PARTS
    assert sum(profiled.parts.values()) == pytest.approx(1)
    assert all(value > 0 for value in profiled.parts.values()), profiled.parts
    assert vars(native) == functions


def test_the_head_of_a_model_that_is_nearly_all_head_is_found(job: Job, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(shapes.SHAPES, "head", (*TINY[:2], 1, *TINY[3:6], 200_000))
        shapes.write_model("head", tmp_path / "head")
    connection, thread = start(OURS, dataclasses.replace(job, model=str(tmp_path / "head")))
    parts = steps(connection, ["step", "profile"])[1].parts
    connection.close()
    thread.join(20)
    assert parts is not None and parts["head products"] + parts["loss"] > 0.5, parts


def test_what_goes_wrong_in_a_side_is_told(job: Job) -> None:
    for side, user in ((OURS, True), (PEERS["lora16"][0], False)):
        ours, theirs = Pipe()
        thread = threading.Thread(target=serve, args=(theirs,), daemon=True)
        thread.start()
        ours.send((side, dataclasses.replace(job, model="/no/such/folder")))
        assert ours.recv() == Imported()
        ours.send("load")
        failed = ours.recv()
        thread.join(20)
        assert isinstance(failed, Failed) and failed.user == user and "/no/such/folder" in failed.text


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_the_flop_are_those_that_torch_counts(kv_heads: int) -> None:
    batch, length, layers, heads, head_size = 3, 20, 2, 4, 16
    config = LlamaConfig(
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_size,
        vocab_size=100,
    )
    config._attn_implementation = "eager"
    lora = LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(LlamaForCausalLM(config), lora)
    model.enable_input_require_grads()  # the first layer's input gets a gradient too, as the formula has it
    ids = torch.randint(0, 100, (batch, length))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    # Left out of the count here: the head at the last position, and the half of attention above the diagonal.
    last = 4 * batch * 48 * 100
    upper = 6 * batch * length**2 * heads * head_size * layers
    assert counter.get_total_flops() == train.matrix_flop(config, batch, length, RANK) + last + upper


def test_anonymous_memory_is_what_the_process_fills() -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("this system does not tell")
    before = process._anonymous(os.getpid())
    # not torch's: what malloc holds of tensors that are gone would be taken again
    block = mmap.mmap(-1, 2**26, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    filled = torch.frombuffer(block, dtype=torch.float32).fill_(1)
    assert 0.9 * filled.nbytes < process._anonymous(os.getpid()) - before < 1.5 * filled.nbytes
    assert process._anonymous(2**30) == 0


def test_a_shape_by_name_is_a_model_that_loads(model: Path) -> None:
    loaded = halfbyte.load(model)
    assert loaded.config.vocab_size == 300 and loaded.config.num_hidden_layers == 2
    tokenizer = load_tokenizer(model)
    assert len(tokenizer("five!")["input_ids"]) == 5


# Parameters: the sum over the embedding, then per layer the four projections, the three of the MLP and two norms, and
# the last norm, as the models' cards give them.
@pytest.mark.parametrize(("shape", "parameters"), [("135m", 134_515_008), ("1b", 1_235_814_400), ("3b", 3_212_749_824)])
def test_the_shapes_have_the_sizes_of_the_models_they_stand_for(shape: str, parameters: int) -> None:
    hidden, inner, layers, heads, kv_heads, head_size, vocabulary = shapes.SHAPES[shape]
    attention = 2 * hidden * head_size * (heads + kv_heads)
    assert vocabulary * hidden + layers * (attention + 3 * hidden * inner + 2 * hidden) + hidden == parameters


def result(seconds: list[float], **more: Any) -> SideResult:
    fields: dict[str, Any] = {"setting": "", "trials": {}, "losses": [2.0], "load_seconds": 1.5, "peak_bytes": 10**9}
    return SideResult(**fields | {"seconds": seconds, "processor_seconds": [2 * x for x in seconds]} | more)


@pytest.fixture
def report() -> TrainingReport:
    row = TrainingRow(
        model="some-model",
        batch=4,
        length=500,
        rank=16,
        flop=6 * 10**12,
        peak_flops=[2e12, 3e12, 4e12],
        sides={
            "halfbyte": result([5.0, 4.0, 10.0]),
            "bitsandbytes": result([10.0, 20.0, 40.0], setting="with checkpointing", peak_bytes=None),
        },
        parts={part: 1 / len(PARTS) for part in PARTS},
    )
    about = Circumstances(
        machine="a chip",
        cores=2,
        memory_gib=8.0,
        load=0.0,
        tier="avx2",
        arithmetic="FMA",
        threads=2,
        versions={"torch": "2.13"},
        date="2026-01-02T03:04:05+00:00",
        commit=None,
        changed=False,
    )
    return TrainingReport(circumstances=about, rows=[row, row.model_copy(update={"length": 1000})])


def test_ratios_and_fractions_are_taken_round_by_round(report: TrainingReport) -> None:
    row = report.rows[0]
    assert row.tokens_per_second["halfbyte"].median == 2000 / 5
    assert row.ratios == {"bitsandbytes": (3.0, 4.0, 4.5)}  # quartiles of 2, 5 and 4
    assert row.fraction_of_peak.median == pytest.approx(6e12 / 4e12 / 5)  # at the highest peak
    assert row.floor_tokens_per_second == pytest.approx(2000 / (6e12 / 4e12))
    assert row.matrix_share == pytest.approx(4 / 8)


def test_the_table_names_every_side_and_what_was_measured(report: TrainingReport) -> None:
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(report.table())
    text = console.export_text()
    for shown in ("some-model, 4×500", "some-model, 4×1000", "bitsandbytes with checkpointing", "4.00 (3.00–4.50)"):
        assert shown in text
    for shown in ("400", "954 MiB", "1.5 s", "50%", "30%", "4,000 GFLOP/s"):
        assert shown in text


@pytest.mark.parametrize("lengths", [[1000], [1000, 2000]])  # beside 500: bars, or a curve
def test_json_comes_back_and_the_picture_can_be_read(
    report: TrainingReport, lengths: list[int], tmp_path: Path
) -> None:
    report.rows[1:] = [report.rows[0].model_copy(update={"length": length}) for length in lengths]
    report.write(tmp_path)
    text = (tmp_path / "training.json").read_text()
    assert TrainingReport.model_validate_json(text) == report
    assert json.loads(text)["rows"][0]["tokens_per_second"]["halfbyte"][1] == 400
    picture = imread(tmp_path / "training.png")
    assert picture.shape[0] > 300 and picture.std() > 0.05 and math.isfinite(picture.sum())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--vs", "lora61"], r"no side 'lora61' to compare with \(did you mean 'lora16'\?\)"),
        (["/no/such/folder"], "There is no folder /no/such/folder"),
        (["--lengths", "256,long"], "--lengths is '256,long'; give numbers"),
        (["--lengths", "256,1"], "a row needs 2 tokens or more"),
        (["--alone", "--vs", "lora16"], "--alone and --vs contradict each other"),
    ],
)
def test_bad_input_is_told_before_anything_starts(arguments: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        CliRunner().invoke(app, ["bench", "train", *arguments], catch_exceptions=False)


@pytest.mark.slow
def test_the_command_measures_every_side_in_a_process_of_its_own(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ways = (Peer(False, False), Peer(False, True))
    monkeypatch.setitem(PEERS, "lora16", ways)
    monkeypatch.setitem(PEERS, "bitsandbytes", (Peer(True, False),))
    command = ["bench", "train", str(model), "--batch", "2", "--length", "24", "--steps", "2", "--rank", str(RANK)]
    done = CliRunner().invoke(app, [*command, "--output", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert "tiny-model, 2×24" in done.stdout
    report = TrainingReport.model_validate_json((tmp_path / "out" / "training.json").read_text())
    (row,) = report.rows
    assert list(row.sides) == ["halfbyte", "bitsandbytes", "lora16"]
    assert row.sides["lora16"].trials.keys() == {way.setting for way in ways}
    assert row.sides["lora16"].setting == min(row.sides["lora16"].trials, key=row.sides["lora16"].trials.get)
    for side in row.sides.values():
        assert len(side.seconds) == 2 and len(side.losses) == train.WARM_UP + 2 and side.load_seconds > 0
        assert side.losses == pytest.approx(row.sides["halfbyte"].losses, rel=2e-2)
        assert side.peak_bytes is None or 0 < side.peak_bytes < 2**30
    assert {"transformers", "peft"} <= report.circumstances.versions.keys()


@pytest.mark.slow
def test_halfbyte_is_measured_alone_at_several_lengths(model: Path, tmp_path: Path) -> None:
    command = ["bench", "train", str(model), "--alone", "--lengths", "8,16,24", "--steps", "2", "--rank", str(RANK)]
    done = CliRunner().invoke(app, [*command, "--output", str(tmp_path)])
    assert done.exit_code == 0, done.output
    report = TrainingReport.model_validate_json((tmp_path / "training.json").read_text())
    assert [(row.length, list(row.sides)) for row in report.rows] == [(n, ["halfbyte"]) for n in (8, 16, 24)]


@pytest.mark.slow
def test_a_side_that_dies_is_told_and_another_way_taken(model: Path, tmp_path: Path) -> None:
    job = Job(str(model), "", str(tmp_path / "run"), 2, 24, RANK, 4)
    broken = dataclasses.replace(job, data="/no/such.jsonl")
    with pytest.raises(InputError, match=r"data file '/no/such\.jsonl' is not there"):
        train._fastest("halfbyte", [OURS], broken, lambda _: None)
    job = dataclasses.replace(job, data=str(train._write_rows(tmp_path / "rows.jsonl", job)))
    failing: Any = SimpleNamespace(setting="", run=int)  # int takes no job
    running = Peer(False, False)
    best = train._fastest("a side", [failing, running], job, lambda _: None)
    assert best.trials[""] is None
    assert best.trials[running.setting] == min(step.seconds for step in best.steps)
    best._process.kill()
    with pytest.raises(ChildProcessError, match="exit code -9, perhaps for want of memory"):
        best.step()
    best.end()
    with pytest.raises(RuntimeError, match=r"(?s)a side did not come through its first steps: .*TypeError"):
        train._fastest("a side", [failing], job, lambda _: None)
