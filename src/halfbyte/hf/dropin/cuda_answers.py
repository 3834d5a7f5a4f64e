"""What a script is told that asks ``torch.cuda`` or ``torch.accelerator`` for a GPU that is not there.

It is about this CPU, and so that the script goes on. Its name says what it is; its memory is the machine's and the
process's; its capability is that of the first GPUs with bfloat16 (8.0), since scripts choose their dtype by it and that
is the one to take here.
"""

import os
import resource
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

NAME = "CPU (halfbyte)"
CAPABILITY = (8, 0)


def _properties(device: Any = None) -> types.SimpleNamespace:
    major, minor = CAPABILITY
    return types.SimpleNamespace(
        name=NAME,
        major=major,
        minor=minor,
        total_memory=psutil.virtual_memory().total,
        multi_processor_count=os.cpu_count() or 1,
        is_integrated=1,
        is_multi_gpu_board=0,
    )


def _free_and_total(device: Any = None) -> tuple[int, int]:
    memory = psutil.virtual_memory()
    return memory.available, memory.total


def _resident(device: Any = None) -> int:
    return int(psutil.Process().memory_info().rss)


def _peak(device: Any = None) -> int:
    try:
        line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _reset_peak(device: Any = None) -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak of the resident set begins anew
    except OSError:
        return


def _summary(*_: Any, **__: Any) -> str:
    return f"{NAME}: {_resident() / 2**20:.0f} MiB resident, {_peak() / 2**20:.0f} MiB at most"


def _statistics(device: Any = None) -> dict[str, int]:
    now, peak = _resident(), _peak()
    return {
        f"{kind}_bytes.all.{when}": value
        for kind in ("allocated", "reserved", "active")
        for when, value in (("current", now), ("peak", peak))
    }


def _seed(seed: int) -> None:
    torch.manual_seed(seed)


def _states() -> list[torch.Tensor]:
    return [torch.get_rng_state()]


def _state(device: Any = None) -> torch.Tensor:
    return torch.get_rng_state()


def _set_state(new_state: torch.Tensor, device: Any = None) -> None:
    torch.set_rng_state(new_state)


def _set_states(new_states: list[torch.Tensor]) -> None:
    torch.set_rng_state(new_states[0])


def _nothing(*_: Any, **__: Any) -> None:
    return None


def _always(value: Any) -> Callable[..., Any]:
    return lambda *_, **__: value


_RESIDENT, _PEAK = "what memory the process has now", "what memory the process had at most"
_NOTHING = "nothing: there is nothing to do"

CUDA: dict[str, tuple[Callable[..., Any], str]] = {
    "is_available": (_always(True), "that there is one, and what it sends there stays on the CPU"),
    "is_initialized": (_always(True), "that it is ready"),
    "device_count": (_always(1), "1"),
    "current_device": (_always(0), "0"),
    "get_device_name": (_always(NAME), repr(NAME)),
    "get_device_capability": (_always(CAPABILITY), f"{CAPABILITY}, of which bfloat16 is part"),
    "get_device_properties": (_properties, "this machine's memory and number of CPUs"),
    "is_bf16_supported": (_always(True), "yes: CPUs have it"),
    "mem_get_info": (_free_and_total, "this machine's free and whole memory"),
    "memory_allocated": (_resident, _RESIDENT),
    "memory_reserved": (_resident, _RESIDENT),
    "memory_cached": (_resident, _RESIDENT),
    "max_memory_allocated": (_peak, _PEAK),
    "max_memory_reserved": (_peak, _PEAK),
    "max_memory_cached": (_peak, _PEAK),
    "memory_summary": (_summary, _RESIDENT),
    "memory_stats": (_statistics, _RESIDENT),
    "reset_peak_memory_stats": (_reset_peak, "nothing: the process's peak is forgotten"),
    "reset_max_memory_allocated": (_reset_peak, "nothing: the process's peak is forgotten"),
    "manual_seed": (_seed, "nothing: the CPU's generator is seeded"),
    "manual_seed_all": (_seed, "nothing: the CPU's generator is seeded"),
    "get_rng_state": (_state, "the state of the CPU's generator"),
    "get_rng_state_all": (_states, "the state of the CPU's generator"),
    "set_rng_state": (_set_state, "nothing: the CPU's generator is set"),
    "set_rng_state_all": (_set_states, "nothing: the CPU's generator is set"),
    "init": (_nothing, _NOTHING),
    "set_device": (_nothing, _NOTHING),
    "empty_cache": (_nothing, _NOTHING),
    "ipc_collect": (_nothing, _NOTHING),
    "synchronize": (_nothing, _NOTHING),
    "set_per_process_memory_fraction": (_nothing, _NOTHING),
}
_SHARED = (
    *("is_available", "device_count", "empty_cache", "synchronize", "reset_peak_memory_stats", "memory_stats"),
    *("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved"),
)
ACCELERATOR: dict[str, tuple[Callable[..., Any], str]] = {
    **{name: CUDA[name] for name in _SHARED},
    "current_accelerator": (_always(torch.device("cuda")), "that it is a GPU"),
    "current_device_index": (_always(0), "0"),
    "set_device_index": (_nothing, _NOTHING),
    "get_memory_info": (_free_and_total, "this machine's free and whole memory"),
}

ANSWERS = {"torch.cuda": CUDA, "torch.accelerator": ACCELERATOR}
"""By module and name: what answers, and what the script is told, in words. Names that a torch lacks are left out."""
