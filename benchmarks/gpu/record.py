"""What the check finds, kept as it is found: a section that fails says so and stops no other."""

import contextlib
import gc
import json
import os
import platform
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

LIBRARIES = ("halfbyte", "transformers", "peft", "trl", "bitsandbytes", "liger-kernel", "triton")


class OutOfTime(Exception):
    """A section's time is up."""


@dataclass
class Job:
    """What is checked.

    Attributes:
        device: where.
        tiny: whether shapes and steps are cut down, so that a CPU does it in seconds.
        provider: the kernels under test on a CPU; on a GPU they are its own.
    """

    device: torch.device
    tiny: bool
    provider: str = ""

    @property
    def on_gpu(self) -> bool:
        """Whether it is a GPU."""
        return self.device.type == "cuda"

    def wait(self) -> None:
        """Wait for the GPU."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def clear(self) -> None:
        """Give back what nobody refers to, and begin to count the peak anew."""
        if self.on_gpu:
            gc.collect()
            self.wait()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> int | None:
        """The most bytes that tensors have taken since the last :meth:`clear`."""
        return torch.cuda.max_memory_allocated(self.device) if self.on_gpu else None

    def context(self) -> int | None:
        """Bytes that are taken of the GPU, but not by torch's allocator: contexts and libraries, of all processes."""
        if not self.on_gpu:
            return None
        free, total = torch.cuda.mem_get_info(self.device)
        return total - free - torch.cuda.memory_reserved(self.device)


@dataclass
class Section:
    """One section under way.

    Attributes:
        title: what it is about.
        until: by ``time.monotonic``, when it must be over.
        rows: what was found, in order.
        failed: names of what did not hold.
    """

    title: str
    until: float
    rows: list[dict[str, Any]] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def row(self, name: str, **figures: Any) -> None:
        """Keep figures."""
        self.rows.append({"name": name, **figures})

    def check(self, name: str, holds: bool, **figures: Any) -> None:
        """Keep figures, and whether a claim holds."""
        self.row(name, holds=bool(holds), **figures)
        if not holds:
            self.failed.append(name)

    @contextlib.contextmanager
    def part(self, name: str, job: Job) -> Iterator[None]:
        """Go on behind this part whatever goes wrong in it, except that there is no time left."""
        if time.monotonic() > self.until:
            raise OutOfTime(name)
        begun = time.monotonic()
        try:
            yield
        except Exception as error:
            self.failed.append(name)
            self.errors.append(f"{name}: {type(error).__name__}: {error}\n{traceback.format_exc(limit=-6)}")
        finally:
            self.row(f"{name}: time", seconds=round(time.monotonic() - begun, 2))
            job.clear()


def run(name: str, function: Callable[[Job, Section], None], job: Job, seconds: float) -> dict[str, Any]:
    """Run a section and return what is to be kept of it."""
    title = (function.__doc__ or "").partition("\n")[0]
    print(title, flush=True)
    section, begun = Section(title, time.monotonic() + seconds), time.monotonic()
    try:
        function(job, section)
    except OutOfTime as late:
        section.failed.append(f"out of time before: {late}")
    except Exception as error:
        section.failed.append(f"{type(error).__name__}: {error}")
        section.errors.append(traceback.format_exc(limit=-6))
    job.clear()
    taken = time.monotonic() - begun
    print(f"   {'FAILED: ' + '; '.join(section.failed) if section.failed else 'holds'}  ({taken:.0f} s)", flush=True)
    for error in section.errors:
        print(error, flush=True)
    return {
        "title": title, "holds": not section.failed, "seconds": round(taken, 1), "failed": section.failed,
        "errors": section.errors, "rows": section.rows,
    }  # fmt: skip


def circumstances(job: Job) -> dict[str, Any]:
    """Return machine and versions."""
    about: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__, "cores": os.cpu_count()}
    for library in LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            about[library] = metadata.version(library)
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        commit = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
        about["commit"] = subprocess.run(commit, capture_output=True, text=True, check=True).stdout.strip()
    about |= {"device": str(job.device), "tiny": job.tiny, "provider": job.provider}
    if job.on_gpu:
        properties = torch.cuda.get_device_properties(job.device)
        about |= {
            "gpu": properties.name, "bytes": properties.total_memory,
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda, "context": job.context(),
        }  # fmt: skip
    return about


def write(report: dict[str, Any], folder: Path) -> None:
    """Write the JSON, whole."""
    part = folder / ".gpu_check.json"
    part.write_text(json.dumps(report, indent=1, default=str) + "\n")
    part.replace(folder / "gpu_check.json")
