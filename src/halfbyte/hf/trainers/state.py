"""The state of a run between two steps, on disk: what resuming needs to give the same bits, without pickle.

checkpoints/step-000123/adapter_model.safetensors, adapter_config.json, the tokenizer
                        state.safetensors     the optimizer's tensors, torch's random state of each process
                        state.json            its numbers, the schedule, Python's and NumPy's random state of each
                                              process, a digest of the data
                        trainer_state.json    transformers' own
"""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor


def state_folder(run: str | Path, step: int) -> Path:
    """Return the folder of the state after ``step`` optimizer steps of the run in ``run``."""
    return Path(run) / "checkpoints" / f"step-{step:06d}"


def saved_states(run: Path) -> list[Path]:
    """Return the saved states of the run in ``run``, oldest first."""
    return sorted((run / "checkpoints").glob("step-*"), key=lambda folder: int(folder.name.removeprefix("step-")))


def flatten(optimizer: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split an optimizer's state dict: its tensors as ``index.name``, everything else as it is."""
    tensors: dict[str, Tensor] = {}
    state: dict[str, dict[str, Any]] = {}
    for index, entries in optimizer["state"].items():
        state[str(index)] = {k: v for k, v in entries.items() if not isinstance(v, Tensor)}
        tensors |= {f"{index}.{k}": v for k, v in entries.items() if isinstance(v, Tensor)}
    return tensors, {"state": state, "param_groups": optimizer["param_groups"]}


def unflatten(tensors: dict[str, Tensor], numbers: dict[str, Any]) -> dict[str, Any]:
    state = {int(index): dict(entries) for index, entries in numbers["state"].items()}
    for key, tensor in tensors.items():
        index, name = key.split(".", 1)
        if index != "random":
            state[int(index)][name] = tensor
    return {"state": state, "param_groups": numbers["param_groups"]}


def read_state(checkpoint: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return load_file(checkpoint / "state.safetensors"), json.loads((checkpoint / "state.json").read_text())


def random_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the random states of this process: torch's by the device, Python's and NumPy's as numbers."""
    tensors = {"cpu": torch.get_rng_state()}
    tensors |= {f"cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    numpy = np.random.get_state(legacy=False)
    numpy["state"]["key"] = numpy["state"]["key"].tolist()
    return tensors, {"python": random.getstate(), "numpy": numpy}


def set_random_state(tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
    version, internal, gauss = numbers["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(numbers["numpy"])
    torch.set_rng_state(tensors["cpu"])
    for i in range(torch.cuda.device_count()):
        torch.cuda.set_rng_state(tensors[f"cuda.{i}"], i)
