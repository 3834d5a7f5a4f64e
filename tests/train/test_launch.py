"""``halfbyte train --processes N``: one run's numbers from several processes, and ends that leave nothing behind."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from halfbyte.errors import InputError
from halfbyte.files import write_text
from halfbyte.train import launch

pytestmark = pytest.mark.slow

OPTIONS: dict[str, Any] = {
    "rank": 4,
    "learning-rate": 1e-2,
    "lora-dropout": 0,
    "gradient-accumulation-steps": 1,
    "compute-dtype": "float32",
    "optimizer": "adamw_torch",
}


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """13 rows, of lengths that differ: three of four and one alone in an epoch, which one of two processes gets."""
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(f'{{"prompt": "{i} is", "completion": " {"yes " * (i % 4)}{i % 3}"}}\n' for i in range(13)))
    return file


Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(tiny_model_folder: Path, rows: Path, tmp_path: Path) -> Iterator[Start]:
    """Starts ``halfbyte train`` with options beside ``OPTIONS``; what still runs at the end is ended."""
    begun: list[subprocess.Popen[str]] = []

    def run(output: str, *launcher: str, **options: Any) -> subprocess.Popen[str]:
        given = {"model": tiny_model_folder, "data": rows, "output": tmp_path / output} | OPTIONS
        given |= {name.replace("_", "-"): value for name, value in options.items()}
        flags = [part for name, value in given.items() for part in (f"--{name}", str(value)) if part != "True"]
        command = [sys.executable, *(launcher or ("-m", "halfbyte")), "train", *flags]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
        begun.append(subprocess.Popen(command, text=True, env=environment, **pipes))  # type: ignore[call-overload]
        return begun[-1]

    yield run
    for process in begun:
        for each in [*_children(process.pid), psutil.Process(process.pid)] if process.poll() is None else ():
            with contextlib.suppress(psutil.Error):
                each.kill()
        process.communicate()


def _children(pid: int) -> list[psutil.Process]:
    with contextlib.suppress(psutil.Error):
        return psutil.Process(pid).children(recursive=True)
    return []


def done(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, err
    return str(out + err)


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []
    return [event for event in map(json.loads, lines) if event["kind"] == kind]


def wait_for_step(run: Path, step: int) -> None:
    deadline = time.monotonic() + 200
    while len(events(run, "step")) < step:
        assert time.monotonic() < deadline, "no step came"
        time.sleep(0.02)


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_give_the_numbers_of_one_in_an_epoch_that_does_not_divide(
    processes: int, start: Start, rows: Path, tmp_path: Path
) -> None:
    same = {"max_steps": 6, "eval_data": rows, "eval_steps": 3, "max_grad_norm": 1.0}
    done(start("one", batch_size=4, **same))
    out = done(start("many", processes=processes, batch_size=4 // processes, **same))
    assert out.count("The adapter is in") == 1
    assert (f"{processes} processes share" in out) == (processes > len(os.sched_getaffinity(0)))
    one, many = tmp_path / "one", tmp_path / "many"
    for name in ("loss", "grad_norm", "trained_tokens", "epoch"):
        theirs, ours = ([step[name] for step in events(run, "step")] for run in (one, many))
        assert ours == pytest.approx(theirs, rel=2e-6), name  # fp32, sums in another order, through six steps
    assert [event["figures"] for event in events(many, "evaluation")] == [
        pytest.approx(event["figures"], rel=2e-6) for event in events(one, "evaluation")
    ]


def test_a_killed_process_ends_the_run_with_a_sentence(start: Start, tmp_path: Path) -> None:
    run = start("run", processes=2, batch_size=2, max_steps=4000, save_steps=5)
    wait_for_step(tmp_path / "run", 7)
    workers = psutil.Process(run.pid).children()
    assert len(workers) == 2
    workers[1].kill()
    _, err = run.communicate(timeout=120)
    assert run.returncode == 2
    told = [line for line in err.splitlines() if "SIGKILL" in line]
    assert len(told) == 1 and told[0].startswith("Error: Process ") and "Traceback" not in err
    assert not any(worker.is_running() for worker in workers)
    assert (tmp_path / "run/checkpoints/step-000005").is_dir()


def test_a_killed_process_begins_again_and_the_end_is_the_same(start: Start, tmp_path: Path) -> None:
    options = {"processes": 2, "batch_size": 2, "max_steps": 40, "save_steps": 5, "lora_dropout": 0.1}
    done(start("whole", **options))
    run = start("killed", max_restarts=1, **options)
    wait_for_step(tmp_path / "killed", 7)
    psutil.Process(run.pid).children()[0].kill()
    _, err = run.communicate(timeout=300)
    assert run.returncode == 0, err
    assert "all begin again from the last checkpoint (1 of 1)" in err and "Going on from" in err
    adapters = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "killed")]
    assert adapters[0] == adapters[1]
    assert [step["loss"] for step in events(tmp_path / "killed", "step")] == [
        step["loss"] for step in events(tmp_path / "whole", "step")
    ]


def test_torchrun_begins_again_what_was_killed(start: Start, tmp_path: Path) -> None:
    options = {"batch_size": 2, "max_steps": 40, "save_steps": 5, "lora_dropout": 0.1}
    done(start("whole", processes=2, **options))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    run = start("killed", *torchrun, "-m", "halfbyte", **options)
    wait_for_step(tmp_path / "killed", 7)
    workers = [child for child in psutil.Process(run.pid).children() if "train" in child.cmdline()]
    workers[1].kill()
    _, err = run.communicate(timeout=300)
    assert run.returncode == 0, err[-3000:]
    assert "Going on from" in err
    whole, killed = (tmp_path / name / "adapter_model.safetensors" for name in ("whole", "killed"))
    assert whole.read_bytes() == killed.read_bytes()


def test_an_interrupted_run_goes_on_with_as_many_processes_or_with_another_number(start: Start, tmp_path: Path) -> None:
    options = {"batch_size": 2, "max_steps": 40, "save_steps": 100}
    done(start("whole", processes=2, **options))
    run = start("stopped", processes=2, **options)
    wait_for_step(tmp_path / "stopped", 5)
    run.send_signal(signal.SIGTERM)
    _, err = run.communicate(timeout=200)
    assert run.returncode == 130, err
    assert err.count("finishing this step") == 1 and err.count("Go on with") == 1
    (checkpoint,) = (tmp_path / "stopped/checkpoints").iterdir()
    assert checkpoint.name == f"step-{events(tmp_path / 'stopped', 'step')[-1]['step']:06d}"
    subprocess.run(["cp", "-r", tmp_path / "stopped", tmp_path / "other"], check=True)
    done(start("stopped", processes=2, resume=True, **options))
    whole, same = (tmp_path / name / "adapter_model.safetensors" for name in ("whole", "stopped"))
    assert whole.read_bytes() == same.read_bytes()

    alone = start("other", resume=True, **options)
    _, err = alone.communicate(timeout=200)
    assert alone.returncode == 0, err
    assert "2 processes began this run and 1 goes on, with gradient_accumulation_steps 2" in err
    losses = [[step["loss"] for step in events(tmp_path / name, "step")] for name in ("whole", "other")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)  # no dropout: sums in another order, through forty steps


def test_a_signal_that_comes_before_the_processes_is_passed_on_to_them() -> None:
    asked = launch.Asked()
    asked.set(signal.SIGTERM)
    late = subprocess.Popen(["sleep", "100"])
    asked.tell()
    assert late.wait(timeout=20) == -signal.SIGTERM


def test_who_is_killed_when_the_run_has_finished_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result, notes = tmp_path / "summary.json", []
    result.write_text("of the run before")
    monkeypatch.setattr(launch, "_run", lambda *_: {0: -signal.SIGKILL})
    with pytest.raises(InputError, match="Process 0 was ended by SIGKILL"):
        launch.launch(2, ["train"], notes.append, 0, result)

    def run(*_: object) -> dict[int, int]:
        write_text(result, "of this one")
        return {1: -signal.SIGKILL}

    monkeypatch.setattr(launch, "_run", run)
    assert launch.launch(2, ["train"], notes.append, 2, result) == 0
    assert notes[-1].text.endswith("when the run had finished")


def test_kto_of_two_processes_goes_on_within_an_epoch_and_after_the_last_step(start: Start, tmp_path: Path) -> None:
    rows = tmp_path / "kto.jsonl"  # an epoch ends with a step of one row and three that are repeated
    lines = [{"prompt": f"{i} is", "completion": f" {'yes ' * (i % 4)}{i}", "label": i % 3 > 0} for i in range(13)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = {"data": rows, "method": "kto", "processes": 2, "batch_size": 2, "epochs": 2, "keep": 8, "save_steps": 1}
    done(start("whole", **options))
    for last in (3, 8):
        run = tmp_path / f"run-{last}"
        subprocess.run(["cp", "-r", tmp_path / "whole", run], check=True)
        (run / "summary.json").unlink()
        for checkpoint in (run / "checkpoints").iterdir():
            if int(checkpoint.name[-6:]) > last:
                shutil.rmtree(checkpoint)
        done(start(run.name, resume=True, **options))
        whole, again = (path / "adapter_model.safetensors" for path in (tmp_path / "whole", run))
        assert whole.read_bytes() == again.read_bytes(), last
        losses = [[step["loss"] for step in events(path, "step")] for path in (tmp_path / "whole", run)]
        assert losses[0] == losses[1] and len(losses[0]) == 8


def test_no_process_outlives_the_command(start: Start, tmp_path: Path) -> None:
    run = start("run", processes=2, batch_size=2, max_steps=4000, save_steps=4000)
    wait_for_step(tmp_path / "run", 2)
    workers = psutil.Process(run.pid).children()
    run.kill()
    gone, alive = psutil.wait_procs(workers, timeout=60)
    assert len(gone) == 2 and not alive
    _, err = run.communicate()
    assert len(list((tmp_path / "run/checkpoints").glob("step-*"))) == 1, err[-3000:]  # they saved what they had


def test_bad_input_is_told_once_and_nothing_is_left(start: Start, tmp_path: Path) -> None:
    run = start("run", processes=2, max_restarts=1, data=tmp_path / "none.jsonl")
    _, err = run.communicate(timeout=120)
    assert run.returncode == 2
    assert err.count("Error:") == 1 and "Error: The data file" in err and "Traceback" not in err
    assert not (tmp_path / "run").exists()


def test_two_machines_meet_by_torchruns_flags(start: Start, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {"batch_size": 2, "max_steps": 4}
    done(start("one", batch_size=4, max_steps=4))
    launcher = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d"]
    launcher += ["--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "test", "--local-addr", "127.0.0.1"]
    machines = [start("two", *launcher, "--node-rank", str(i), "-m", "halfbyte", **options) for i in range(2)]
    outs = [done(machine) for machine in machines]
    assert sorted(out.count("The adapter is in") for out in outs) == [0, 1]
    losses = [[step["loss"] for step in events(tmp_path / name, "step")] for name in ("one", "two")]
    assert losses[1] == pytest.approx(losses[0], rel=2e-6)


DIFFERENT = """
import os, sys
os.environ["HALFBYTE_CACHE"] += os.environ["RANK"]
if os.environ["RANK"] == "1":
    {}
from halfbyte.cli import main
main()
"""


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("import halfbyte; halfbyte.__version__ = '9.9'", r"halfbyte of the processes differ: .* of process 0, 9\.9"),
        ("sys.argv += ['--seed', '7']", "option seed of the processes differ: 0 of process 0, 7 of process 1"),
        ("sys.argv[sys.argv.index('--data') + 1] += '.other'", "training data of the processes differ: "),
        ("sys.argv[sys.argv.index('--output') + 1] += '.other'", "is another folder for process 1 than for the first"),
        ("os.environ['GLOO_SOCKET_IFNAME'] = 'nothing0'", "GLOO_SOCKET_IFNAME is nothing0, but"),
    ],
)
def test_processes_that_differ_are_told_before_they_train(
    change: str, told: str, start: Start, rows: Path, tmp_path: Path
) -> None:
    Path(f"{rows}.other").write_text(rows.read_text().replace("yes", "no"))
    script = tmp_path / "start.py"
    script.write_text(DIFFERENT.format(change))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run = start("run", *launcher, str(script), batch_size=2, max_steps=4)
    _, err = run.communicate(timeout=200)
    assert run.returncode != 0
    assert len([line for line in err.splitlines() if re.match(f"Error: .*{told}", line)]) == 1, err
    assert not (tmp_path / "run").exists()


def test_a_port_in_use_is_told(start: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        group = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        for name, value in group.items():
            monkeypatch.setenv(name, value)
        run = start("run", batch_size=2)
        _, err = run.communicate(timeout=120)
    assert run.returncode == 2
    assert f"cannot meet at 127.0.0.1:{port}, since another program uses this port" in err and "Traceback" not in err


MEASURE = """
import os, re, sys
from pathlib import Path
from halfbyte.train import build, run
whole = run.build_model
def measured(*args):
    def anonymous():
        return int(re.search(r"^Anonymous:\\s+(\\d+)", Path("/proc/self/smaps_rollup").read_text(), re.M)[1]) * 1024
    before = anonymous()
    model = whole(*args)
    Path(os.environ["MEASURED"] + os.environ.get("RANK", "0")).write_text(str(anonymous() - before))
    return model
run.build_model = measured
from halfbyte.cli import main
main()
"""


def test_processes_of_a_machine_share_one_base(
    start: Start, tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # some 420 million weights: 211 MB in 4 bits, their scales beside
    big = tmp_path / "big"
    subprocess.run(["cp", "-r", tiny_model_folder, big], check=True)
    config = LlamaConfig(
        **json.loads((tiny_model_folder / "config.json").read_text())
        | {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 12, "num_attention_heads": 16}
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to_empty(device="cpu").to(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.02, 0.02)
    model.save_pretrained(big)
    packed = sum(p.numel() for name, p in model.named_parameters() if "proj" in name) // 2
    del model
    assert packed > 190e6
    script = tmp_path / "start.py"
    script.write_text(MEASURE)
    monkeypatch.setenv("MEASURED", str(tmp_path / "anonymous."))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    run = start("run", *launcher, model=big, batch_size=1, max_steps=1, max_length=64, compute_dtype="bfloat16")
    done(run)
    for rank in range(2):
        taken = int((tmp_path / f"anonymous.{rank}").read_text())
        assert taken < packed / 4, f"process {rank} took {taken} bytes of its own beside {packed} of the base"


PASSES = {
    "text": lambda i: {"text": f"line {i} " + "word " * (i % 5)},
    "dpo": lambda i: {"prompt": f"{i} is", "chosen": f" {'yes ' * (i % 4)}{i}", "rejected": f" no {i % 3}"},
    "kto": lambda i: {"prompt": f"{i} is", "completion": f" {'yes ' * (i % 4)}{i}", "label": i % 3 != 0},
}


@pytest.mark.parametrize("method", ["text", "dpo", "kto", "orpo"])
def test_other_methods_give_the_numbers_of_one_process(method: str, start: Start, tmp_path: Path) -> None:
    """13 rows in passes of six: of the last pass, one row, the second process has none."""
    file = tmp_path / f"{method}.jsonl"
    row = PASSES["dpo" if method == "orpo" else method]
    file.write_text("".join(json.dumps(row(i)) + "\n" for i in range(13)))
    options = {"data": file, "method": method, "max_steps": 5, "max_length": 64, "learning_rate": 1e-3}
    options |= {"eval_data": file, "eval_steps": 4, "no_eval_before": True, "max_new_tokens": 4}
    done(start("one", batch_size=6, **options))
    done(start("two", batch_size=3, processes=2, **options))
    for name in ("loss", "grad_norm", "trained_tokens", "figures"):
        one, two = ([step[name] for step in events(tmp_path / run, "step")] for run in ("one", "two"))
        for theirs, ours in zip(one, two, strict=True):  # rewards and kl: differences of sums
            assert ours == pytest.approx(theirs, rel=2e-6, abs=5e-5 if name == "figures" else 0), name
    one, two = ([event["figures"] for event in events(tmp_path / run, "evaluation")] for run in ("one", "two"))
    assert len(one) == 2
    for theirs, ours in zip(one, two, strict=True):
        assert ours == pytest.approx(theirs, rel=2e-6, abs=5e-5)


@pytest.mark.parametrize("optimizer", ["adamw_torch", "paged_adamw_8bit"])
def test_a_base_that_is_divided_trains_to_the_same_bytes_and_goes_on(
    optimizer: str, start: Start, rows: Path, tmp_path: Path
) -> None:
    options = {"processes": 2, "batch_size": 2, "max_steps": 6, "save_steps": 3, "keep": 2, "lora_dropout": 0.1}
    options |= {"optimizer": optimizer, "gradient_checkpointing": optimizer != "adamw_torch"}
    options |= {"eval_data": rows, "eval_steps": 3, "max_new_tokens": 8, "forgetting_data": "builtin"}
    options = {name: value for name, value in options.items() if value is not False}
    done(start("whole", **options))
    done(start("divided", fsdp="full_shard", **options))
    whole, divided, resumed = (tmp_path / name for name in ("whole", "divided", "resumed"))
    assert {file.name for file in whole.iterdir()} == {file.name for file in divided.iterdir()}
    subprocess.run(["cp", "-r", divided, resumed], check=True)
    subprocess.run(["rm", "-r", resumed / "checkpoints/step-000006", resumed / "summary.json"], check=True)
    done(start("resumed", fsdp="shard_grad_op", resume=True, **options))
    adapters = [(folder / "adapter_model.safetensors").read_bytes() for folder in (whole, divided, resumed)]
    assert adapters[0] == adapters[1] == adapters[2]
    for kind, name in (("step", "loss"), ("evaluation", "figures"), ("sample", "answer")):
        told = [[event[name] for event in events(folder, kind)] for folder in (whole, divided)]
        assert told[0] == told[1], kind


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"fsdp": "full_shard"}, "fsdp divides the base over several processes, and there is one; set processes"),
        ({"fsdp": "full_shard", "processes": 2, "task": "classify"}, "fsdp is for language models, and the task is"),
    ],
)
def test_a_base_that_cannot_be_divided_is_told(
    options: dict[str, Any], sentence: str, start: Start, tmp_path: Path
) -> None:
    run = start("run", **options)
    _, err = run.communicate(timeout=200)
    assert run.returncode == 2 and err.count(sentence) == 1 and "Traceback" not in err
    assert not (tmp_path / "run").exists()
