"""The folder that a model is written to: what is looked at before, a sentence where it will not do, and the writing."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from halfbyte import __version__
from halfbyte.errors import InputError, check_room, check_writable
from halfbyte.files import absolute, growing_folder, repair, stamp
from halfbyte.hf.models.dense import Written, copy_beside, sources
from halfbyte.hf.models.shards import write_shards
from halfbyte.locks import Locked

TRAINED = ("adapter_config.json", "run.json", "checkpoints")
"""What a folder has that was trained, and is never replaced."""


def free_folder(output: str | Path, overwrite: bool, holds: str = "config.json") -> Path:
    """Return the folder ``output`` as an absolute path, if a model may be written there.

    Args:
        output: as the user names it.
        overwrite: whether a model that is there may be replaced.
        holds: the file that tells a model's folder from others, which are never replaced; a pattern.

    Raises:
        InputError: it may not.
    """
    output = absolute(output)
    repair(output)
    if output.is_file():
        raise InputError(f"{output} is a file; name a folder.")
    if output.exists() and not overwrite:
        raise InputError(f"{output} is there already; choose another folder or overwrite it (--overwrite).")
    if output.exists() and (not any(output.glob(holds)) or any((output / name).exists() for name in TRAINED)):
        raise InputError(f"{output} holds no model that could be overwritten; choose another folder.")
    check_writable(output)
    return output


def check_apart(output: Path, sources: Iterable[Path]) -> None:
    """Check that none of the folders that are read lies in the one that is written.

    Raises:
        InputError: one does.
    """
    if any(source.resolve().is_relative_to(output.resolve()) for source in sources):
        raise InputError(f"The output folder {output} holds the adapter or the base itself; choose another.")


def write_model(
    model: Written,
    output: Path,
    about: Mapping[str, Any],
    *,
    sizes: Mapping[str, int],
    make: Callable[[str], Mapping[str, Tensor]],
    finish: Callable[[Path], None],
    what: str = "The exported model",
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Write a model's weights, made one by one, and what lies beside them; the folder appears whole.

    Who was interrupted goes on with the same arguments, from the last file of a gigabyte that was whole.

    Args:
        model: what is written.
        output: as :func:`free_folder` gives it.
        about: what decides the content, beside the model's own files; goes into JSON.
        sizes: bytes of what is to be made, by names.
        make: returns the tensors that one of these names stands for.
        finish: writes configuration and card into the folder that it is given.
        what: is written, as a sentence begins with it.
        progress: called with names done and names in all.

    Returns:
        The bytes of all tensors.

    Raises:
        InputError: the folder is in use, the disk has no room, or a value is not finite.
    """
    folders = sources(model)
    check_apart(output, folders)
    check_room(output, sum(sizes.values()), what)
    key = {"version": __version__, **about, "sources": [stamp(folder) for folder in folders]}
    try:
        with growing_folder(output, json.dumps(key)) as folder:
            nbytes = write_shards(folder, sizes, make, progress)
            copy_beside(model, folder)
            finish(folder)
    except Locked as error:
        raise InputError(f"{output} is being written by another process; wait for it, or choose another.") from error
    return nbytes
