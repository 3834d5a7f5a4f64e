"""What is installed here, what this machine offers, and what to do about what is missing."""

import dataclasses
import importlib.metadata
import os
import platform
import shutil
from pathlib import Path

import huggingface_hub.constants
import psutil
import torch

from halfbyte import __version__
from halfbyte.errors import size_text
from halfbyte.kernels import gpu, native, provider_for, providers
from halfbyte.memory import memory_limit
from halfbyte.runs.circumstances import kernels_in_force

LIBRARIES = ("torch", "transformers", "peft", "trl", "accelerate", "datasets")
COMPILERS = ("c++", "g++", "clang++")


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        name: what was looked at.
        value: what was found.
        hint: what to do about it; empty if there is nothing to do.
    """

    name: str
    value: str
    hint: str = ""


def report() -> list[Finding]:
    """Look at this installation and this machine.

    Raises:
        InputError: ``HALFBYTE_ISA`` asks for an instruction-set tier that is not there.
    """
    return [
        Finding("halfbyte", __version__),
        Finding("Python", f"{platform.python_version()}, {platform.system()} {platform.machine()}"),
        *_kernels(),
        _threads(),
        _memory(),
        *(Finding(name, importlib.metadata.version(name)) for name in LIBRARIES),
        _bitsandbytes(),
        _liger(),
        _cuda(),
        _cache(),
    ]


def line() -> str:
    """Return one line that names the version, the provider and the instruction-set tier in force."""
    name, *tier = kernels_in_force().split(" ", 1)
    return f"halfbyte {__version__}: {' '.join([name, 'kernels', *tier])}, {torch.get_num_threads()} threads"


def _provider(device: str) -> str:
    chosen = provider_for(torch.device(device))
    return next(name for name, provider in providers().items() if provider is chosen)


def _kernels() -> list[Finding]:
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if native.available():
        tiers = ", ".join(native.tiers())
        return [
            Finding("kernels", _provider("cpu")),
            Finding("instruction set", f"{native.tier()} (of {tiers}; HALFBYTE_ISA chooses)"),
            Finding("C++ compiler", compiler or "none (the kernels are built)"),
        ]
    step = "reinstall halfbyte" if compiler else "install a C++ compiler (g++ or clang++), then reinstall halfbyte"
    return [
        Finding("kernels", _provider("cpu"), f"To get the fast native kernels, {step}."),
        Finding("C++ compiler", compiler or "none"),
    ]


def _threads() -> Finding:
    used, cores = torch.get_num_threads(), psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
    asked = os.environ.get("OMP_NUM_THREADS")
    value = f"{used} of {cores} cores, OMP_NUM_THREADS {asked or 'not set'}"
    if asked is not None and used < cores:
        return Finding("threads", value, f"Unset OMP_NUM_THREADS to use all {cores} cores.")
    return Finding("threads", value)


def _memory() -> Finding:
    memory = psutil.virtual_memory()
    value = f"{size_text(memory.total)}, {size_text(memory.available)} available"
    limit = memory_limit()
    if limit is not None and limit < memory.total:
        value += f", {size_text(limit)} allowed to this container"
    return Finding("memory", value)


def _bitsandbytes() -> Finding:
    try:
        return Finding("bitsandbytes", f"{importlib.metadata.version('bitsandbytes')} (its kernels serve CUDA tensors)")
    except importlib.metadata.PackageNotFoundError:
        return Finding("bitsandbytes", "none (optional)")


def _liger() -> Finding:
    try:
        version = importlib.metadata.version("liger-kernel")
    except importlib.metadata.PackageNotFoundError:
        return Finding("liger-kernel", "none (optional)")
    if not gpu.available():
        return Finding("liger-kernel", f"{version}, without Triton", "Its kernels need Triton: pip install triton.")
    return Finding("liger-kernel", f"{version} (its kernels serve decoder layers on CUDA)")


def _cuda() -> Finding:
    if not torch.cuda.is_available():
        others = [name for name in ("mps", "xpu") if getattr(torch, name).is_available()]
        unused = f"; {' and '.join(others)} would run on torch's operations, and are not chosen" if others else ""
        return Finding("CUDA", f"none (the CPU is used{unused})")
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    kernels = _provider("cuda")
    hint = "To get the fast kernels for it, install bitsandbytes." if kernels == "reference" else ""
    return Finding("CUDA", f"{torch.version.cuda}, {', '.join(names)}, {kernels} kernels", hint)


def _cache() -> Finding:
    folder = Path(huggingface_hub.constants.HF_HUB_CACHE)
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    return Finding("model cache", f"{folder} ({size_text(shutil.disk_usage(there).free)} free; HF_HOME moves it)")
