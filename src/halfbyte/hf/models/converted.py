"""Models in others' number formats, opened: quantized anew once, tensor by tensor, and kept in the cache.

A GGUF file, or a folder in GPTQ's, AWQ's or MXFP4's, becomes one of our own in ``~/.cache/halfbyte/models``
(``XDG_CACHE_HOME`` and ``HALFBYTE_CACHE`` move it), under a name made of the source's files (path, size, times) and of
the number format; it is mapped as any. What the second rounding costs is measured and said.

So does a 16-bit folder that several processes train over, since they share the mapping; and one that in the number
format asked for would not fit into memory, since what is mapped need not be there as a whole
(:mod:`halfbyte.hf.models.paging`).
"""

import hashlib
import json
import logging
import time
from pathlib import Path

from halfbyte import __version__, locks, mapped
from halfbyte.choices import SAVEABLE_TYPES
from halfbyte.files import cache_folder, write_text
from halfbyte.hf.models.checkpoint import weight_files
from halfbyte.hf.models.config import HalfbyteConfig
from halfbyte.hf.models.foreign.packed import Packing
from halfbyte.hf.models.hub import Place
from halfbyte.hf.models.quantize_files import on_disk, quantize_checkpoint

logger = logging.getLogger(__name__)

SHARE = 0.75
"""Of the memory that is free, what weights may take that are not mapped."""
ABOUT = "converted.json"
"""A file in the folder: source and relative error."""


def converted(
    place: Place, packing: Packing | None, config: HalfbyteConfig | None, trust_remote_code: bool = False
) -> tuple[Place, str]:
    """Return where the model in ``place`` lies in ``config``'s format, made unless it is there, and what that cost.

    Args:
        place: of the model.
        packing: how its weights are packed; None of a GGUF file.
        config: the format; None takes the defaults.
        trust_remote_code: run code that comes with the model.

    Raises:
        InputError: as :func:`halfbyte.hf.models.quantize_files.quantize_checkpoint`.
    """
    config = config or HalfbyteConfig()
    source = place.gguf or on_disk(place)
    folder = _made(source, config, trust_remote_code)
    error = json.loads((folder / ABOUT).read_text(encoding="utf-8"))["error"]
    held = packing.method.upper() if packing else "GGUF"
    told = f"rounded a second time, from another grid ({held}), {100 * error:.1f} % off those of the source"
    logger.warning("%s is opened in %s, its weights %s; it is kept in %s.", source, config.quant_type, told, folder)
    return Place(str(folder), True, {}), told


def is_too_large(place: Place, config: HalfbyteConfig, free: int) -> bool:
    """Return whether a 16-bit model would not fit into ``free`` bytes once quantized, going by its files alone."""
    if place.gguf or config.bits is None or config.quant_type not in SAVEABLE_TYPES or not mapped.available():
        return False
    files = [file for file in weight_files(on_disk(place)) if file.suffix == ".safetensors"]
    return sum(file.stat().st_size for file in files) * config.bits / 16 > SHARE * free


def shared(place: Place, config: HalfbyteConfig, trust_remote_code: bool = False) -> Path:
    """Return a folder with the 16-bit model in ``place`` in ``config``'s format, made unless it is there.

    Processes that open it map one copy of its weights, where each would quantize and hold its own.

    Raises:
        InputError: as :func:`halfbyte.hf.models.quantize_files.quantize_checkpoint`.
    """
    return _made(on_disk(place), config, trust_remote_code)


def _made(source: Path, config: HalfbyteConfig, trust_remote_code: bool) -> Path:
    """Return the folder of the model in ``source``; of several processes that want it one makes it, the others wait."""
    folder = _folder(source, config)
    while not (folder / ABOUT).is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            held = locks.lock(folder.with_name(f"{folder.name}.lock"))
        except locks.Locked:
            time.sleep(0.2)
            continue
        with held:
            if not (folder / ABOUT).is_file():
                copy = quantize_checkpoint(source, folder, config, overwrite=True, trust_remote_code=trust_remote_code)
                write_text(folder / ABOUT, json.dumps({"source": str(source.absolute()), "error": copy.error}) + "\n")
    return folder


def _folder(source: Path, config: HalfbyteConfig) -> Path:
    files = [source] if source.is_file() else sorted(source.iterdir())
    digest = hashlib.sha256(f"{__version__} {sorted(config.in_memory().items(), key=str)}".encode())
    for file in files:
        about = file.stat()
        digest.update(f"{file.absolute()} {about.st_size} {about.st_mtime_ns} {about.st_ctime_ns}".encode())
    return cache_folder() / "models" / f"{source.stem if source.is_file() else source.name}-{digest.hexdigest()[:16]}"
