"""``checksums.json`` of a folder: what belongs into it, byte for byte, so that damage is told before it is read.

    {"version": 1, "about": {"step": 50, "run": "5f0c..."}, "files": {"state.json": {"bytes": 812, "sha256": "..."}},
     "digest": "..."}

It is written last. ``digest`` is that of the rest (JSON, keys sorted, no spaces), so that damage to this file is told
as such, and not as another file's. Its form may grow, but not the meaning of ``version`` and ``digest``. SHA-256, as
processors have instructions for it, and as ``sha256sum`` can look at the files too. Files that are not listed are
nobody's business.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

NAME = "checksums.json"
VERSION = 1
"""Of the folder's form; counted up when an older halfbyte could not read a newer one's folder."""


class Damaged(Exception):
    """A folder is not what its checksums say: a sentence without its end, such as ``state.json is damaged``."""


def write(folder: Path, **about: Any) -> None:
    """Write the checksums of all files in ``folder``, at any depth.

    Args:
        folder: complete but for them.
        **about: what the folder is, as JSON.
    """
    files = {name: _sum(folder / name) for name in _names(folder)}
    content = {"version": VERSION, "about": about, "files": files}
    text = json.dumps(content | {"digest": digest_of(content)}, indent=1)
    (folder / NAME).write_text(text + "\n", encoding="utf-8")


def check(folder: Path) -> dict[str, Any]:
    """Return what was written ``about`` the folder if every file in it is as it was then.

    Raises:
        Damaged: one is not, and which.
    """
    if not folder.is_dir():
        raise Damaged("it is no folder")
    try:
        content = json.loads((folder / NAME).read_text(encoding="utf-8"))
        digest = content.pop("digest")
        version, about, files = content["version"], content.get("about"), content.get("files")
    except FileNotFoundError:
        raise Damaged(f"it has no {NAME}, so it is not whole, or not halfbyte's") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise Damaged(f"{NAME} is damaged") from None
    if digest != digest_of(content):
        raise Damaged(f"{NAME} is damaged")
    if version != VERSION:
        raise Damaged(f"a newer halfbyte wrote it (form {version}; this one knows {VERSION})")
    for name, expected in files.items():
        try:
            found = _sum(folder / name)
        except FileNotFoundError:
            raise Damaged(f"{name} is missing") from None
        except OSError as error:
            raise Damaged(f"{name} cannot be read ({error.strerror})") from None
        if found["bytes"] != expected["bytes"]:
            raise Damaged(f"{name} is damaged ({found['bytes']:,} bytes of {expected['bytes']:,})")
        if found != expected:
            raise Damaged(f"{name} is damaged")
    return dict(about)


def about(folder: Path) -> dict[str, Any]:
    """Return what was written ``about`` a folder that has been checked."""
    return dict(json.loads((folder / NAME).read_text(encoding="utf-8"))["about"])


def step_of(folder: Path) -> int:
    """Return the number that the name of a checkpoint ends with: the steps that were done when it was saved."""
    return int(folder.name.rpartition("-")[2])


def saved(folder: Path) -> list[Path]:
    """Return the checkpoints ``step-N`` in ``folder``, good or not, oldest first."""
    return sorted((path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name)), key=step_of)


def newest_good(folders: Sequence[Path], **expected: Any) -> tuple[Path | None, list[str]]:
    """Return the last of ``folders`` that is whole, and of those behind it what is wrong with them, a sentence each.

    Args:
        folders: oldest first; the name of each ends with its step.
        **expected: what each has to say ``about`` itself; None is not looked at.
    """
    told: list[str] = []
    for folder in reversed(folders):
        try:
            about = check(folder)
            step = step_of(folder)
            if about.get("step", step) != step:
                raise Damaged(f"it is that of step {about['step']}")
            for name, value in expected.items():
                if value is not None and about.get(name) != value:
                    raise Damaged(f"it belongs to another {name}")
        except Damaged as error:
            told.append(f"{folder.name}: {error}")
        else:
            return folder, told
    return None, told


def none_is_good(run: Path, damaged: Sequence[str]) -> str:
    """Return the sentence which says that no checkpoint of ``run`` can be gone on from, and why of each."""
    return (
        f"{run} holds no checkpoint that can be gone on from ({'; '.join(damaged)}). Nothing was removed: put one back "
        "from a copy, or begin another run."
    )


def _names(folder: Path) -> list[str]:
    files = (file for file in folder.rglob("*") if not file.is_dir())
    return sorted(name for file in files if (name := file.relative_to(folder).as_posix()) != NAME)


def _sum(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256")
        return {"bytes": stream.tell(), "sha256": digest.hexdigest()}


def digest_of(content: dict[str, Any]) -> str:
    """Return the digest of what is to be written as JSON."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
