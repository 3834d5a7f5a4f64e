"""The state of a run between two steps, on disk: what resuming needs to give the same bits, without pickle.

checkpoints/step-000123/adapter_model.safetensors, adapter_config.json, the tokenizer
                        state.safetensors     the optimizer's tensors, torch's random state of each process
                        state.json            its numbers, the schedule, Python's and NumPy's random state of each
                                              process, a digest of the data
                        trainer_state.json    transformers' own
                        checksums.json        of all of them, and whose it is (halfbyte.checksums)
"""

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from halfbyte import checksums
from halfbyte.errors import InputError


def state_folder(run: str | Path, step: int) -> Path:
    """Return the folder of the state after ``step`` optimizer steps of the run in ``run``."""
    return Path(run) / "checkpoints" / f"step-{step:06d}"


def saved_states(run: Path) -> list[Path]:
    """Return the saved states of the run in ``run``, oldest first."""
    return checksums.saved(run / "checkpoints")


def steps_planned(checkpoint: Path) -> int:
    """Return how many steps the run was to have when ``checkpoint`` was saved."""
    return int(json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["max_steps"])


def flatten(tree: Any, name: str = "") -> tuple[dict[str, Tensor], Any]:
    """Split a tree of dictionaries and lists, as a state dict is, into its tensors by their path and the rest for JSON.

    A tensor's place in the rest is ``{"tensor": path}``.
    """
    if isinstance(tree, Tensor):
        return {name: tree.contiguous()}, {"tensor": name}
    if not isinstance(tree, (dict, list, tuple)):
        return {}, tree
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    tensors: dict[str, Tensor] = {}
    rest = {}
    for key, value in items:
        found, rest[str(key)] = flatten(value, f"{name}.{key}" if name else str(key))
        tensors |= found
    return tensors, rest if isinstance(tree, dict) else list(rest.values())


def unflatten(tensors: Mapping[str, Tensor], rest: Any) -> Any:
    """Undo :func:`flatten`; keys that are numbers become ``int`` again, and tuples stay lists."""
    if isinstance(rest, list):
        return [unflatten(tensors, value) for value in rest]
    if not isinstance(rest, dict):
        return rest
    if rest.keys() == {"tensor"}:
        return tensors[rest["tensor"]]
    return {int(key) if key.isdecimal() else key: unflatten(tensors, value) for key, value in rest.items()}


def read_state(checkpoint: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the numbers of ``checkpoint``.

    Raises:
        InputError: there are none.
    """
    if not checkpoint.is_dir():
        raise InputError(f"There is no checkpoint {checkpoint} to go on from.")
    if not (checkpoint / "state.json").is_file():
        raise InputError(
            f"{checkpoint} holds no state of halfbyte's trainers (state.json, state.safetensors) to go on from: it was "
            "saved by another trainer, or with save_only_model=True."
        )
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
