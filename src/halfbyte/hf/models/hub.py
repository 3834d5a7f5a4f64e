"""Where a model is: a folder, or an id of the hub. What is neither is told at once, with the name that is near.

The hub is asked once whether it has the model, with a time limit, before anything is downloaded: huggingface_hub (2.4)
itself goes on trying for half a minute where there is no network. Without one a model that was downloaded before is
opened as it is.
"""

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, is_offline_mode, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import httpx, validate_repo_id  # type: ignore[attr-defined]

from halfbyte.errors import InputError, nearest

PATIENCE = 2.0
"""Seconds that the hub has to answer in."""

GIVE = "give the folder of a model, an adapter or a run, or a hub id"


@dataclass(frozen=True)
class Place:
    """Where a model is.

    Attributes:
        path: a folder or a hub id.
        is_folder: which of the two.
        options: what transformers has to be told about the hub.
    """

    path: str
    is_folder: bool
    options: dict[str, Any]


def locate(path: str | Path) -> Place:
    """Find the model ``path``; ``~`` is the user's home.

    Raises:
        InputError: there is no such folder, and the hub has no such model or cannot be reached.
    """
    text = str(path)
    try:
        folder = Path(text).expanduser()
    except RuntimeError as error:
        raise InputError(f"There is no folder {text}: {error}.") from error
    if folder.is_dir():
        return Place(str(folder), True, {})
    if folder.exists():
        raise InputError(f"{text} is a file; give the folder of a model, an adapter or a run.")
    near = _near(folder)
    if not _may_be_an_id(text):
        raise InputError(f"There is no folder {text}{near}; {GIVE}.")
    cached = isinstance(try_to_load_from_cache(text, "config.json"), str)
    if is_offline_mode():
        if cached:
            return Place(text, False, {"local_files_only": True})
        raise InputError(
            f"There is no folder {text}{near}, and the hub is not asked, since HF_HUB_OFFLINE is set; {GIVE} that was "
            "downloaded before."
        )
    reason = _asked(text)
    if reason is None:
        return Place(text, False, {})
    if cached:
        return Place(text, False, {"local_files_only": True})
    raise InputError(f"There is no folder {text}{near}, and {reason}; {GIVE}.")


def _may_be_an_id(text: str) -> bool:
    if text.startswith(("~", ".", "/")) or text.endswith("/") or "\\" in text:
        return False
    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return True


def _near(folder: Path) -> str:
    """Return `` (did you mean '…'?)`` for the folder that is named almost so, at whichever level the names part."""
    parent = folder.parent
    while not parent.is_dir() and parent != parent.parent:
        folder, parent = parent, parent.parent
    try:
        names = [entry.name for entry in parent.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
    except OSError:
        return ""
    return nearest(str(folder), [str(parent / name) for name in names]) if nearest(folder.name, names) else ""


def _asked(repository: str) -> str | None:
    """Ask the hub for ``repository``; return why it cannot be had, or None."""
    outcome: list[Exception | None] = []

    def ask() -> None:
        try:
            HfApi().model_info(repository, timeout=PATIENCE)
            outcome.append(None)
        except Exception as error:  # carried to the caller, who raises what is not known
            outcome.append(error)

    # In a thread, since looking up a host's name heeds no time limit.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE + 0.5)
    error = outcome[0] if outcome else httpx.TimeoutException(f"no answer within {PATIENCE:.0f} s")
    if error is None:
        return None
    if isinstance(error, RepositoryNotFoundError):
        return "the hub has no such model, or none that you may see (hf auth login)"
    if isinstance(error, HfHubHTTPError):
        return f"the hub refuses to say whether it has such a model ({_first_line(error)})"
    if isinstance(error, httpx.TransportError | OSError):
        return f"the hub cannot be reached ({_first_line(error)})"
    raise error


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].strip().rstrip(".")
