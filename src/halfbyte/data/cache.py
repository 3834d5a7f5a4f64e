"""Tables of tokens are made once: kept under a name made of all that they depend on.

That is the bytes of the data, the options of reading, the tokenizer with its template, and the code of this package
and of the libraries under it. They lie in ``~/.cache/halfbyte/rows`` (``XDG_CACHE_HOME`` and ``HALFBYTE_CACHE`` move
it); those that nobody has used for a month go when a new one comes. A table that somebody has mapped outlives its file.
Each has checksums, and a damaged one is made again. Where the cache cannot be written, a temporary folder takes its
place.
"""

import contextlib
import errno
import functools
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte import checksums
from halfbyte.files import cache_folder, remove_folder, repair_within, whole_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KEPT_SECONDS = 30 * 24 * 3600
LIBRARIES = ("datasets", "pyarrow", "tokenizers", "transformers")
UNWRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR)
USED = "used"
"""A file in a table's folder: its time of change is when the table was last asked for."""


def key(*parts: Any) -> str:
    """Return the name of what is made of ``parts`` (JSON values) by this code."""
    text = json.dumps([_code(), *parts], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def tokenizer_key(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return a digest of all that decides about a tokenizer's ids and texts."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    about = [type(tokenizer).__name__, tokenizer.chat_template, tokenizer.special_tokens_map]
    kinds = sorted((token, repr(added)) for token, added in tokenizer.added_tokens_encoder.items())
    switches = {name: value for name, value in tokenizer.init_kwargs.items() if isinstance(value, bool | int)}
    return key(hashlib.sha256(words.encode()).hexdigest(), about, kinds, switches)


def kept(name: str, make: Callable[[Path], None]) -> tuple[Path, bool]:
    """Return the folder ``name`` of the cache, and whether it is a temporary one that its user removes.

    Args:
        name: a :func:`key`.
        make: fills the folder if it is not there.
    """
    place = cache_folder() / "rows" / name
    try:
        if (place / USED).is_file() and _is_whole(place):
            os.utime(place / USED)
        else:
            place.parent.mkdir(parents=True, exist_ok=True)
            _tidy(place.parent)
            with whole_folder(place) as part:
                make(part)
                checksums.write(part)
                (part / USED).touch()
        return place, False
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
    place = Path(tempfile.mkdtemp(prefix="halfbyte-rows-"))
    try:
        make(place)
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)
        raise
    return place, True


def _is_whole(place: Path) -> bool:
    """Return whether a table is as it was made; a damaged one is removed, to be made again."""
    try:
        checksums.check(place)
    except checksums.Damaged:
        with contextlib.suppress(FileNotFoundError):  # somebody else has
            remove_folder(place)
        return False
    return True


def _tidy(rows: Path) -> None:
    """Remove what killed processes left, and what has not been used for a month."""
    repair_within(rows)
    for used in rows.glob(f"*/{USED}"):
        with contextlib.suppress(OSError):
            if time.time() - used.stat().st_mtime > KEPT_SECONDS:
                shutil.rmtree(used.parent)


@functools.cache
def _code() -> str:
    """Return a digest of the code that makes tables."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    digest.update(repr([version(library) for library in LIBRARIES]).encode())
    return digest.hexdigest()
