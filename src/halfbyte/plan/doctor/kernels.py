"""Which kernels are in force, what would be faster, and whether they are right (:mod:`.self_test`)."""

import contextlib
import importlib.util
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import psutil
import torch

from halfbyte.errors import InputError, named
from halfbyte.kernels import gpu, native, provider_for, providers
from halfbyte.plan.doctor import limits, machine
from halfbyte.plan.doctor.finding import Finding, looked
from halfbyte.plan.doctor.self_test import CASES, ISA, REBUILD, self_test

COMPILERS = ("c++", "g++", "clang++")


def found() -> list[dict[str, str]]:
    """Return all that this file and :mod:`.machine` find where torch is imported, as JSON has it."""
    findings = [
        *looked("threads", _threads), *looked("kernels", check), *looked("libraries", libraries),
    ]  # fmt: skip
    return [asdict(finding) for finding in findings]


def _threads() -> Iterator[Finding]:
    cores = psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
    quota = limits.cpu_quota(limits.membership())
    return machine.threads(torch.get_num_threads(), cores, quota, limits.usable_processors(), dict(os.environ))


def check() -> Iterator[Finding]:
    """Yield what serves the operations on the CPU and on a GPU, and what of it is wrong."""
    yield from _in_force()
    wrong = False
    for name in _tiers():
        for finding in self_test("native", name):
            wrong = True
            yield finding
    if torch.cuda.is_available() and provider_name("cuda") != "reference":
        for finding in self_test(provider_name("cuda"), device="cuda"):
            wrong = True
            yield finding
    if not wrong:
        tiers = _tiers()
        tried = f"of {named(tiers)}" if tiers else "of the reference alone, which is torch"
        yield Finding("self-test", f"{len(CASES)} operations {tried}: right")


def provider_name(device: str) -> str:
    """Return the name of the provider in force for a type of device."""
    chosen = provider_for(torch.device(device))
    return next(name for name, provider in providers().items() if provider is chosen)


def _tiers() -> list[str]:
    return native.tiers() if native.runtime.AVAILABLE else []


def _in_force() -> Iterator[Finding]:
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    try:
        there = native.available()
    except InputError as error:
        yield Finding("instruction set", str(error), "Every command ends with this sentence.", f"unset {ISA}", "fault")
        there = False
    if not there:
        other = of_another_python(_folders())
        step = REBUILD if compiler else f"apt-get install g++ && {REBUILD}"
        yield Finding(
            "kernels",
            "reference"
            + (f"; {named(other)} {'is' if len(other) == 1 else 'are'} for another Python or system" if other else ""),
            "Without the native kernels every step is torch's own, several times slower.",
            f"{step}  # builds the native kernels"
            + ("" if compiler else "; on other systems, install g++ or clang++ as it is done there"),
            "warning",
        )
        yield Finding("C++ compiler", compiler or "none")
        return
    yield Finding("kernels", provider_name("cpu"))
    yield from _tier()
    yield Finding("C++ compiler", compiler or "none (the kernels are built)")


def _tier() -> Iterator[Finding]:
    known = native.tiers()
    try:
        chosen = native.tier()
    except InputError as error:
        yield Finding("instruction set", str(error), "Every command ends with this sentence.", f"unset {ISA}", "fault")
        return
    value = f"{chosen} (of {', '.join(known)}; {ISA} chooses)"
    if chosen == known[0]:
        yield Finding("instruction set", value)
        return
    yield Finding(
        "instruction set",
        value,
        f"{ISA} is set, and this chip has a faster tier: {known[0]}.",
        f"unset {ISA}",
        "warning",
    )


def _folders() -> list[Path]:
    """Return the folders that halfbyte is imported from."""
    spec = importlib.util.find_spec("halfbyte")
    return [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []


def of_another_python(folders: Sequence[Path]) -> list[str]:
    """Return the files of an extension in ``folders``, which this Python has not taken for one."""
    return sorted(file.name for folder in folders for file in folder.glob("_native*") if file.suffix in (".so", ".pyd"))


def libraries() -> Iterator[Finding]:
    """Yield what halfbyte can use and does not need, and the GPU."""
    from importlib.metadata import PackageNotFoundError, version

    with contextlib.suppress(PackageNotFoundError):
        there = version("bitsandbytes")
        if torch.cuda.is_available():
            yield Finding("bitsandbytes", f"{there} (its kernels serve CUDA tensors)")
        else:
            yield Finding("bitsandbytes", f"{there} (without a GPU nothing needs it: the kernels here are halfbyte's)")
    with contextlib.suppress(PackageNotFoundError):
        there = version("liger-kernel")
        if gpu.available():
            yield Finding("liger-kernel", f"{there} (its kernels serve decoder layers on CUDA)")
        else:
            yield Finding(
                "liger-kernel", f"{there}, without Triton", "Its kernels need Triton.", "pip install triton", "note"
            )
    yield from _gpu()


def _gpu() -> Iterator[Finding]:
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        serving = provider_name("cuda")
        value = f"{torch.version.cuda}, {', '.join(names)}, {serving} kernels"
        if serving == "reference":
            why = "Without bitsandbytes' kernels 4-bit layers on the GPU are torch's own operations, and slow."
            yield Finding("CUDA", value, why, "pip install 'halfbyte[bitsandbytes]'", "warning")
        else:
            yield Finding("CUDA", value)
        return
    if list(Path("/dev").glob("nvidia[0-9]*")):
        built = torch.version.cuda
        yield Finding(
            "CUDA",
            f"there is an NVIDIA GPU, and torch {torch.__version__} cannot use it",
            f"torch is built for CUDA {built}: the driver may be too old for it."
            if built
            else "This torch is built without CUDA.",
            "nvidia-smi  # says which CUDA the driver knows" if built else "pip install --force-reinstall torch",
            "warning",
        )
        return
    others = [name for name in ("mps", "xpu") if getattr(torch, name).is_available()]
    unused = f"; {' and '.join(others)} would run on torch's operations, and are not chosen" if others else ""
    yield Finding("CUDA", f"none (the CPU is used{unused})")
    if torch.version.cuda:
        yield Finding(
            "torch's build",
            f"for CUDA {torch.version.cuda}, on a machine without an NVIDIA GPU",
            "It computes the same, and takes gigabytes of disk for libraries that nothing loads.",
            "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cpu",
            "note",
        )
