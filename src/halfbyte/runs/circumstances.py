"""What a run's bits depend on beside its options: versions, kernels, threads, processor, processes, base model."""

import dataclasses
import hashlib
import importlib.metadata
import platform
from pathlib import Path
from typing import Any

import huggingface_hub
import psutil
import torch
from huggingface_hub.errors import HFValidationError
from pydantic import BaseModel, ConfigDict, Field

from halfbyte import __version__
from halfbyte.kernels import native, provider_for, providers

LIBRARIES = ("torch", "transformers", "peft", "trl")
SAMPLED = 2**16
"""Bytes that are read at the beginning, the middle and the end of a weight file for its fingerprint."""


class Circumstances(BaseModel):
    """Where and with what a run goes.

    Attributes:
        versions: of halfbyte, Python and the libraries that compute.
        kernels: the provider on a CPU, with its instruction-set tier.
        threads: of torch, in each process.
        processes: that train together.
        machine: the processor's name.
        cores: of the machine.
        memory_bytes: of the machine.
        base_model: a fingerprint of the base model's files.
        base_config: a digest of its configuration; empty where there is none.
        written: when each of its weight files was written, in nanoseconds since 1970, as the file system has it.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    versions: dict[str, str]
    kernels: str
    threads: int
    processes: int
    machine: str
    cores: int
    memory_bytes: int
    base_model: str
    base_config: str = ""
    written: dict[str, int] = Field(default_factory=dict)

    @classmethod
    def here(cls, model: str, processes: int = 1) -> "Circumstances":
        """Return those of this process, for a run over ``model`` (a folder or hub id)."""
        return cls(
            versions=versions(),
            kernels=kernels_in_force(),
            threads=torch.get_num_threads(),
            processes=processes,
            machine=processor(),
            cores=psutil.cpu_count(logical=False) or psutil.cpu_count() or 1,
            memory_bytes=psutil.virtual_memory().total,
            base_model=fingerprint(model),
            base_config=_config_digest(folder_of(model)),
            written={file.name: file.stat().st_mtime_ns for file in _weight_files(folder_of(model))},
        )


@dataclasses.dataclass(frozen=True)
class Changes:
    """What is other than when the run began, as texts such as ``threads were 2 and are 1``.

    Attributes:
        noted: may change bits of the result; the run goes on and says so.
        refused: makes it another run.
    """

    noted: list[str]
    refused: list[str]


def changes(before: Circumstances, now: Circumstances, base_is_known: bool = False) -> Changes:
    """Compare the circumstances of a run that goes on with those in which it began; memory and cores do not matter.

    Args:
        before: when it began.
        now: when it goes on.
        base_is_known: whether all weights of the base were compared and are as they were: its files may be others then,
            but not its configuration.
    """
    noted = [
        f"{name} was {before.versions.get(name, 'not there')} and is {version}"
        for name, version in now.versions.items()
        if before.versions.get(name) != version
    ]
    for name, verb in (("kernels", "were"), ("threads", "were"), ("machine", "was")):
        old, new = getattr(before, name), getattr(now, name)
        if old != new:
            noted.append(f"{name} {verb} {old} and {'are' if verb == 'were' else 'is'} {new}")
    if before.processes != now.processes:
        noted.append(f"processes were {before.processes} and are {now.processes}, so that dropout drops other values")
    again = [name for name, time in now.written.items() if before.written.get(name, time) != time]
    if again and before.base_model == now.base_model and not base_is_known:
        files = f"{again[0]}{f' and {len(again) - 1} more' if len(again) > 1 else ''}"
        noted.append(
            f"{files} of the base model {'were' if len(again) > 1 else 'was'} written since, of which only samples are "
            "compared, so that a changed weight might not be seen"
        )
    refused = []
    same_config = bool(now.base_config) and before.base_config == now.base_config
    if before.base_model != now.base_model and not (base_is_known and same_config):
        refused.append("the base model's files are others")
    return Changes(noted, refused)


def versions() -> dict[str, str]:
    """Return the versions of halfbyte, Python and the libraries that compute."""
    own = {"halfbyte": __version__, "python": platform.python_version()}
    return own | {name: importlib.metadata.version(name) for name in LIBRARIES}


def kernels_in_force() -> str:
    """Return the provider of operations on a CPU, and the native one's instruction-set tier, as ``native (avx512)``."""
    chosen = provider_for(torch.device("cpu"))
    name = next(name for name, provider in providers().items() if provider is chosen)
    return f"{name} ({native.tier()})" if name == "native" else name


def processor() -> str:
    """Return the processor's name with family and model, by which the makers tell apart what they name alike."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.is_file() else ""
    about = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in text.splitlines())}
    if "model name" not in about:
        return platform.processor() or platform.machine()
    return f"{about['model name']} (family {about['cpu family']}, model {about['model']})"


def fingerprint(model: str) -> str:
    """Return a digest of the base model's configuration and of its weight files' names, sizes, headers and samples.

    It tells another model, or another revision, from the same one in milliseconds, and is no checksum of all bytes: of
    a weight file 64 KiB each at the beginning, the middle and the end are read, and of safetensors the header, which
    has the names, types, shapes and places of all tensors. It misses single weights that were changed elsewhere, in
    files of the same size and layout; that such a file was written again is seen by its time
    (``Circumstances.written``), if that was not set back. Of code that comes with a model, and of its tokenizer, it
    sees nothing.
    """
    digest = hashlib.sha256()
    home = folder_of(model)
    config = home / "config.json"
    if home.is_dir() and config.is_file():
        digest.update(config.read_bytes())
    for file in _weight_files(home):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as stream:
            if file.suffix == ".safetensors":
                length = int.from_bytes(stream.read(8), "little")  # of the header, which follows
                digest.update(stream.read(min(length, size)))
            for place in (0, size // 2, max(size - SAMPLED, 0)):
                stream.seek(place)
                digest.update(stream.read(SAMPLED))
    return digest.hexdigest()[:16]


def _config_digest(home: Path) -> str:
    config = home / "config.json"
    return hashlib.sha256(config.read_bytes()).hexdigest()[:16] if config.is_file() else ""


def _weight_files(home: Path) -> list[Path]:
    """Return the files in a model's folder that hold weights, or its only file."""
    files = [home] if home.is_file() else sorted(home.glob("*"))
    return [file for file in files if file.suffix in (".safetensors", ".bin", ".gguf") and file.is_file()]


def folder_of(model: str) -> Path:
    """Return the folder of a model, or its GGUF file; of a hub id the snapshot that is here."""
    if Path(model).exists():
        return Path(model)
    try:
        cached: Any = huggingface_hub.try_to_load_from_cache(model, "config.json")
    except HFValidationError:
        return Path(model)  # a folder that is gone
    return Path(cached).parent if isinstance(cached, str) else Path(model)
