"""What a launcher tells a process, and options of several processes."""

import os
from pathlib import Path

import pytest

from halfbyte.cli.processes import out_of_memory, started
from halfbyte.errors import InputError
from halfbyte.runs import launched
from halfbyte.runs.config import TrainConfig


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    return TrainConfig.from_yaml(None, {"model": "m", "data": "d.jsonl", "output": tmp_path / "run", "processes": 2})


def test_a_process_that_nobody_launched_has_no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", launched.RESTARTS, "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    assert not launched.is_launched() and launched.job() is None and launched.restarts() == 0


def test_a_job_stays_the_same_when_its_processes_begin_again(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"}.items():
        monkeypatch.setenv(name, value)
    first = launched.job()
    assert first is not None and first.startswith(f"{os.getppid()} ")  # torchrun, which was given no name
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    assert launched.job() == first and launched.restarts() == 2
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "night")
    assert launched.job() == "night"


def test_another_number_of_processes_than_the_launchers_is_refused(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    with pytest.raises(InputError, match="torchrun started 3 processes here, but processes is 2"):
        started(config)
    assert not started(config.model_copy(update={"processes": 3}))
    assert not started(config.model_copy(update={"processes": 1}))


def test_memory_that_ran_out_is_a_sentence() -> None:
    with pytest.raises(InputError, match="There is no memory left for this process"):
        out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"))
    out_of_memory(RuntimeError("something else"))


def test_restarts_without_processes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="max_restarts is for several processes"):
        TrainConfig.from_yaml(None, {"model": "m", "data": "d", "output": tmp_path, "max_restarts": 1})
