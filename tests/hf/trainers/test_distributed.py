"""Two real processes (torchrun, gloo) that train one model: against one process with twice the batch."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from halfbyte.errors import InputError
from halfbyte.hf.trainers import distributed

SCRIPT = Path(__file__).with_name("distributed_run.py")


def run(model: Path, output: Path, processes: int, **options: Any) -> list[dict[str, Any]]:
    """Train, and return what each process wrote down."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(launch if processes > 1 else []), str(SCRIPT), str(model), str(output)]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [*command, json.dumps(options)], capture_output=True, text=True, check=False, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(Path(f"{output}.{i}.json").read_text()) for i in range(processes)]


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("order", ["random", "group_by_length"])
def test_two_processes_train_as_one_with_twice_the_batch(order: str, tiny_model_folder: Path, tmp_path: Path) -> None:
    options = {"steps": 5, "accumulation": 2, "order": order, "save_steps": 2}  # two epochs of four steps
    one = run(tiny_model_folder, tmp_path / "one", 1, batch=4, **options)[0]
    two = run(tiny_model_folder, tmp_path / "two", 2, batch=2, **options)
    assert [process["processes"] for process in two] == [2, 2]
    for process in two:
        # fp32; other batches pad otherwise, and AdamW lifts rounding of tiny gradients in the first steps
        assert process["losses"] == pytest.approx(one["losses"], rel=1e-4)
        assert process["tokens"] == one["tokens"]
    ours, theirs = adapter(tmp_path / "two/adapter"), adapter(tmp_path / "one/adapter")
    for name, tensor in theirs.items():
        if "lora_B" in name:  # zero at first
            assert (ours[name] - tensor).norm() < 1e-2 * tensor.norm(), name
    assert len(list((tmp_path / "two/checkpoints").iterdir())) == 2


@pytest.mark.slow
@pytest.mark.parametrize("rows", [12, 13, 15])  # which divide; of 13 and 15 the second process has none and one left
def test_an_evaluation_by_two_processes_is_that_of_one(rows: int, tiny_model_folder: Path, tmp_path: Path) -> None:
    one = run(tiny_model_folder, tmp_path / "one", 1, batch=4, steps=1, evaluated=rows)[0]
    for process in run(tiny_model_folder, tmp_path / "two", 2, batch=2, steps=1, evaluated=rows):
        assert process["eval_loss"] == pytest.approx(one["eval_loss"], rel=1e-4)


@pytest.mark.slow
def test_processes_that_pack_their_shares_train_as_one_that_does_not(tiny_model_folder: Path, tmp_path: Path) -> None:
    options = {"steps": 5, "accumulation": 3, "batch": 2}  # 16 rows: the second step of an epoch is smaller
    plain = run(tiny_model_folder, tmp_path / "plain", 2, **options)
    packed = run(tiny_model_folder, tmp_path / "packed", 2, packed=160, **options)
    for process in packed:
        assert process["losses"] == pytest.approx(plain[0]["losses"], rel=1e-4)
        assert process["tokens"] == plain[0]["tokens"]
    assert packed[0]["wishes"] != packed[1]["wishes"]  # one's samples would go into fewer passes
    assert packed[0]["passes"] == packed[1]["passes"] and len(packed[0]["passes"]) < len(plain[0]["passes"])
    ours, theirs = adapter(tmp_path / "packed/adapter"), adapter(tmp_path / "plain/adapter")
    for name, tensor in theirs.items():
        if "lora_B" in name:  # zero at first
            assert (ours[name] - tensor).norm() < 1e-2 * tensor.norm(), name


@pytest.mark.slow
def test_one_process_writes_and_the_group_goes_on_from_what_it_wrote(tiny_model_folder: Path, tmp_path: Path) -> None:
    whole, first = tmp_path / "whole", tmp_path / "first"
    two = run(tiny_model_folder, whole, 2, batch=2, steps=4)
    run(tiny_model_folder, first, 2, batch=2, steps=2, save_steps=2)
    checkpoint = first / "checkpoints/step-000002"
    assert [path.name for path in first.iterdir() if path.name != "adapter"] == ["checkpoints"]
    assert [path.name for path in checkpoint.parent.iterdir()] == ["step-000002"]
    resumed = run(tiny_model_folder, first, 2, batch=2, steps=4, resume=str(checkpoint))
    assert all(torch.equal(adapter(first / "adapter")[k], v) for k, v in adapter(whole / "adapter").items())
    assert resumed[0]["losses"] == two[0]["losses"]
    cores = len(os.sched_getaffinity(0))
    assert [process["threads"] for process in two] == [max(1, cores // 2)] * 2
    alone = run(tiny_model_folder, first, 1, batch=2, steps=4, resume=str(checkpoint))[0]
    assert "was made by 2 processes with steps of 4 rows, and 1 would have 2" in alone["error"]
    other = run(tiny_model_folder, first, 1, batch=4, steps=4, resume=str(checkpoint))[0]
    assert other["losses"] == pytest.approx(two[0]["losses"], rel=1e-3)  # the same rows, summed in another order


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_after_the_same_step(tiny_model_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    processes = run(tiny_model_folder, output, 2, batch=2, steps=8, sigterm=True, rank=1)
    (checkpoint,) = (output / "checkpoints").iterdir()
    last = int(checkpoint.name.removeprefix("step-"))
    assert [process["steps"] for process in processes] == [last, last] and 2 <= last < 8


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_of_one_process_ends_the_other_with_a_sentence(
    rank: int, tiny_model_folder: Path, tmp_path: Path
) -> None:
    processes = run(tiny_model_folder, tmp_path / "run", 2, batch=2, steps=8, fail=True, rank=rank)
    assert processes[rank]["error"] == "the disk is made of cheese" and processes[rank]["kind"] == "InputError"
    assert processes[1 - rank]["kind"] == "ElsewhereError"


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_gradient_that_is_not_finite_in_one_process_is_told_by_the_first(
    rank: int, tiny_model_folder: Path, tmp_path: Path
) -> None:
    processes = run(tiny_model_folder, tmp_path / "run", 2, batch=2, steps=8, infinite=rank)
    assert [process["kind"] for process in processes] == ["InputError", "ElsewhereError"]
    assert processes[0]["error"] == processes[1]["error"]
    assert "the gradient of step 1 is not finite, first in the gradient of base_model" in processes[0]["error"]


@pytest.mark.slow
def test_processes_that_would_each_train_alone_are_refused(tiny_model_folder: Path, tmp_path: Path) -> None:
    for process in run(tiny_model_folder, tmp_path / "run", 2, batch=2, trl=True):
        assert "There are 2 processes, but trl.trainer.sft_config.SFTConfig is for one" in process["error"]
    assert not (tmp_path / "run").exists()


SLOW_FIRST = """
import time
from halfbyte.hf.trainers import distributed
distributed.join(use_cpu=True, timeout=2)
with distributed.first_writes() as writes:
    if writes:
        time.sleep(6)
print(f"together {distributed.rank()} {distributed.total(1)}")  # in one piece: the two write to one pipe
distributed.leave()
"""


@pytest.mark.slow
def test_processes_wait_longer_for_work_than_for_gradients(tmp_path: Path) -> None:
    """As for the samples that the first one answers; the group's timeout is that of gradients."""
    script = tmp_path / "slow_first.py"
    script.write_text(SLOW_FIRST)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "together 0 2" in done.stdout and "together 1 2" in done.stdout


def test_alone_nothing_is_asked_of_anybody(monkeypatch: pytest.MonkeyPatch) -> None:
    distributed.join()
    assert (distributed.world_size(), distributed.rank(), distributed.is_first()) == (1, 0, True)
    assert distributed.agreed(True) and not distributed.agreed(False)
    assert distributed.total(7) == 7 and distributed.gather("x") == ["x"]
    with distributed.first_writes() as writes:
        assert writes
    with pytest.raises(InputError, match="mine"), distributed.agreed_errors():
        raise InputError("mine")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(InputError, match="there are 2 processes, but they cannot meet"):
        distributed.join()
