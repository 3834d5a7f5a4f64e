"""What the hub tells of a model that is not on this machine: nothing is downloaded."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from halfbyte.errors import size_text
from halfbyte.hf.models.hub import described
from halfbyte.memory import free_memory
from halfbyte.plan.doctor import storage
from halfbyte.plan.doctor.finding import Finding

WEIGHTS = (".safetensors", ".bin", ".gguf")


def examine_id(text: str) -> list[Finding]:
    """Look at a model of the hub.

    Raises:
        InputError: the hub has none of that name, or cannot be reached.
    """
    return list(told_of(text, described(text), storage.hub_cache()))


def told_of(text: str, about: Any, cache: Path) -> Iterator[Finding]:
    """Yield what a model's page says.

    Args:
        text: its id.
        about: as the hub describes it.
        cache: where it would come to lie.
    """
    import shutil

    files = {file.rfilename: file.size or 0 for file in about.siblings or ()}
    weights = {name: size for name, size in files.items() if name.endswith(WEIGHTS)}
    safe = {name: size for name, size in weights.items() if name.endswith(".safetensors")}
    nbytes = sum((safe or weights).values())
    yield Finding(
        "hub",
        f"{text} is on the hub, and not on this machine: {size_text(nbytes)} of weights",
        "What is in it can be looked at once it is here.",
        f"hf download {text}; halfbyte doctor {text}",
        "note",
    )
    if about.gated:
        yield Finding(
            "gated",
            "its owner lets in whom they have agreed with",
            "Without that the download ends with error 403.",
            f"hf auth login  # then agree on the model's page, {text}",
            "warning",
        )
    if "config.json" not in files and "adapter_config.json" not in files:
        yield Finding(
            "files",
            "there is no config.json"
            + ("; its weights are GGUF files" if any(n.endswith(".gguf") for n in files) else ""),
            "transformers opens no such model; halfbyte opens a GGUF file as a file.",
            f"hf download {text} FILE.gguf --local-dir models",
            "warning",
        )
    if weights and not safe and not any(name.endswith(".gguf") for name in weights):
        yield Finding(
            "files", "its weights are .bin files alone", "They are read without running code in them.", level="note"
        )
    there = next(folder for folder in (cache, *cache.parents) if folder.exists())
    if nbytes > (free := shutil.disk_usage(there).free):
        yield Finding(
            "disk",
            f"{size_text(nbytes)} to download, {size_text(free)} free in {there}",
            "The download breaks off when the disk is full.",
            "export HF_HOME=/a/folder/on/a/larger/disk",
            "fault",
        )
    dtype = getattr(getattr(about, "safetensors", None), "total", None)
    if dtype and (needed := int(dtype * 4.5 / 8)) > (free := free_memory()):
        yield Finding(
            "memory",
            f"{dtype:,} parameters are about {size_text(needed)} in 4 bits, and {size_text(free)} are free",
            "The base is then paged from the disk, at its speed.",
            "Take a smaller model, or see docs/training.md about a base beyond memory.",
            "warning",
        )
