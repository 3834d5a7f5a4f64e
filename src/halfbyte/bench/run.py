"""The run of the kernel benchmark: fix the circumstances, measure every work, report."""

import contextlib
import datetime
import functools
import importlib.metadata
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import psutil
import torch

from halfbyte.bench import measure
from halfbyte.bench.measure import Ring, fastest, interleaved, memory_kept
from halfbyte.bench.report import Circumstances, Report, Row
from halfbyte.bench.works import Work
from halfbyte.errors import InputError, nearest
from halfbyte.kernels import native, provider_for
from halfbyte.runs.circumstances import processor

ROUNDS = 9
PROBE_ROUNDS = 2_000_000
LOOKUP_ROUNDS = 1_000_000
LIBRARIES = ("halfbyte", "torch", "bitsandbytes")
CHECKOUT = Path(__file__).resolve().parents[3]


def bench_kernels(
    works: Sequence[Work],
    *,
    isa: str | None = None,
    threads: int | None = None,
    rounds: int = ROUNDS,
    progress: Callable[[int, str], None] | None = None,
) -> Report:
    """Measure ``works`` (:func:`halfbyte.bench.works.kernel_works`) and return what was found.

    Args:
        works: what to measure.
        isa: the instruction-set tier; None takes the one in force.
        threads: for every implementation; None takes torch's number. bitsandbytes keeps to it only where this process
            has not imported it yet.
        rounds: how often the implementations take turns, 2 or more.
        progress: called before each work with how many are done, and its name.

    Raises:
        InputError: there is no such tier here.
    """
    with forced(isa, threads), memory_kept():
        arithmetic, flop, ceiling = peak()
        found = circumstances(arithmetic)
        moved, copy = _copy()
        rows = []
        for done, work in enumerate(works):
            if progress is not None:
                progress(done, work.name)
            with torch.random.fork_rng():
                torch.manual_seed(0)
                sides = work.sides()
            ceilings = {"arithmetic": ceiling, "copy": copy}
            values = _lookups(work)
            if values:
                ceilings["lookups"] = Ring([functools.partial(native.probe_lookups, LOOKUP_ROUNDS)])
            seconds = interleaved(sides | ceilings, rounds)
            rows.append(
                Row(
                    operation=work.operation,
                    size=work.size,
                    flop=work.flop,
                    bytes=work.bytes,
                    lookups=work.lookups if values else 0,
                    settings={name: side.setting for name, side in sides.items() if side.setting},
                    peak_flops=[flop / second for second in seconds.pop("arithmetic")],
                    copy_bandwidth=[moved / second for second in seconds.pop("copy")],
                    lookup_rate=[values / second for second in seconds.pop("lookups", [])],
                    seconds=seconds,
                )
            )
    return Report(circumstances=found, rows=rows)


class Measured(Protocol):
    """A report, of whatever was measured."""

    circumstances: Circumstances


def default_folder(report: Measured) -> Path:
    """Return where a report goes: ``benchmarks/results/`` of the checkout, else the working directory."""
    c = report.circumstances
    if c.commit is None:
        return Path(f"halfbyte-bench-{c.date[:10]}-{c.tier}")
    return CHECKOUT / "benchmarks" / "results" / f"{c.date[:10]}-{c.commit}-{c.tier}"


@contextlib.contextmanager
def forced(isa: str | None, threads: int | None) -> Iterator[None]:
    """Run with this tier and this number of threads, and put things back afterwards."""
    if isa is not None and isa not in native.tiers():
        known = ", ".join(native.tiers()) or "none, since the native kernels are not installed"
        raise InputError(f"There is no tier {isa!r} here{nearest(isa, native.tiers())}; there is {known}.")
    before, torch_threads = dict(os.environ), torch.get_num_threads()
    if isa is not None:
        os.environ["HALFBYTE_ISA"] = isa
    torch.set_num_threads(threads or torch_threads)
    os.environ["OMP_NUM_THREADS"] = str(threads or torch_threads)  # bitsandbytes' runtime reads it when it is loaded
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        torch.set_num_threads(torch_threads)


def peak() -> tuple[str, int, Ring]:
    """Return what measures the ceiling of arithmetic: its name, the flop of a call, the calls."""
    if _native():
        flop = native.probe(PROBE_ROUNDS)
        return native.probed_arithmetic(), flop, Ring([functools.partial(native.probe, PROBE_ROUNDS)])
    matrices = [torch.randn(1024, 1024, dtype=dtype) for dtype in (torch.bfloat16, torch.float32)]
    side = fastest(*(Ring([functools.partial(torch.mm, a, a)], f"dense {a.dtype} product of torch") for a in matrices))
    return side.setting, 2 * 1024**3, side


def _copy() -> tuple[int, Ring]:
    """Return what measures the bandwidth of memory: the bytes that a call reads and writes, the calls."""
    source = torch.ones(measure.RING_BYTES, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * source.nbytes, Ring([functools.partial(target.copy_, source)])


def _lookups(work: Work) -> int:
    """Return the values that a call of the tier's lookup probe looks up, or 0 if ``work`` or the tier has none."""
    return native.probe_lookups(LOOKUP_ROUNDS) if work.lookups and _native() else 0


def _native() -> bool:
    return provider_for(torch.device("cpu")) is native


def circumstances(arithmetic: str, libraries: Sequence[str] = LIBRARIES) -> Circumstances:
    """Return where, with what and when this process measures: see :class:`Circumstances`."""
    versions = {"Python": platform.python_version()}
    for name in libraries:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    commit = _git("rev-parse", "--short", "HEAD")
    return Circumstances(
        machine=processor(),
        cores=psutil.cpu_count(logical=False) or psutil.cpu_count() or 1,
        memory_gib=round(psutil.virtual_memory().total / 2**30, 1),
        load=round(os.getloadavg()[0], 2),
        tier=native.tier() if _native() else "reference",
        arithmetic=arithmetic,
        threads=torch.get_num_threads(),
        spincount=os.environ.get("GOMP_SPINCOUNT"),
        versions=versions,
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        commit=commit,
        changed=bool(_git("status", "--porcelain", "--untracked-files=no")),
    )


def _git(*arguments: str) -> str | None:
    """Return what git says about the checkout that this package runs from, or None."""
    if not (CHECKOUT / ".git").exists() or shutil.which("git") is None:
        return None
    return subprocess.run(["git", "-C", CHECKOUT, *arguments], capture_output=True, text=True).stdout.strip() or None
