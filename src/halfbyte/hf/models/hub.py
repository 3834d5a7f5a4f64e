"""Where a model is: a folder, or an id of the hub. What is neither is told at once, with the name that is near.

The hub is asked once whether it has the model (:mod:`halfbyte.hub`). Without a network a model that was downloaded
before is opened as it is. An adapter is downloaded here, since more than PEFT reads what stands in its folder.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import is_offline_mode, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import httpx, validate_repo_id  # type: ignore[attr-defined]

from halfbyte.errors import InputError, nearest
from halfbyte.hub import PATIENCE, first_line, reason_without

ADAPTER = "adapter_config.json"
FILES = ("adapter_*", "*.json", "*.jinja", "*.model", "*.txt")
"""What of an adapter's repository is downloaded; and of no folder in it."""
GIVE = "give the folder of a model, an adapter or a run, or a hub id"


@dataclass(frozen=True)
class Place:
    """Where a model is.

    Attributes:
        path: a folder or a hub id.
        is_folder: which of the two.
        options: what transformers has to be told about the hub, or of a GGUF file.
        gguf: the file in the folder, if it is one of GGUF that is meant.
    """

    path: str
    is_folder: bool
    options: dict[str, Any]
    gguf: Path | None = None


def locate(path: str | Path) -> Place:
    """Find the model ``path``; ``~`` is the user's home.

    Raises:
        InputError: there is no such folder, and the hub has no such model or cannot be reached.
    """
    text = str(path)
    if not text.strip():
        raise InputError(f"A name is empty; {GIVE}.")
    try:
        folder = Path(text).expanduser()
    except RuntimeError as error:
        raise InputError(f"There is no folder {text}: {error}.") from error
    if folder.is_dir():
        return _of_gguf(_only_gguf(folder)) or Place(str(folder), True, {})
    if folder.is_file() and folder.suffix == ".gguf":
        return _of_gguf(folder) or Place(str(folder.parent), True, {})
    if folder.exists():
        raise InputError(f"{text} is a file; give the folder of a model, an adapter or a run, or a GGUF file.")
    near = _near(folder)
    if not _may_be_an_id(text):
        raise InputError(f"There is no folder {text}{near}; {GIVE}.")
    adapter = try_to_load_from_cache(text, ADAPTER)
    cached = isinstance(adapter, str) or isinstance(try_to_load_from_cache(text, "config.json"), str)
    offline = Place(text, False, {"local_files_only": True})
    if isinstance(adapter, str):
        offline = Place(str(Path(adapter).parent), True, {})
    if is_offline_mode():
        if cached:
            return offline
        raise InputError(
            f"There is no folder {text}{near}, and the hub is not asked, since HF_HUB_OFFLINE is set; {GIVE} that was "
            "downloaded before."
        )
    told: list[Any] = []
    reason = reason_without(lambda api: told.append(api.model_info(text, timeout=PATIENCE)), "model")
    if reason is None:
        has_adapter = any(file.rfilename == ADAPTER for file in told[0].siblings or ())
        return _downloaded(text) if has_adapter else Place(text, False, {})
    if cached:
        return offline
    raise InputError(f"There is no folder {text}{near}, and {reason}; {GIVE}.")


def described(text: str) -> Any:
    """Return what the hub tells of a model that is not here: files, sizes, who may see it. Nothing is downloaded.

    Raises:
        InputError: ``text`` is no id of the hub, or the hub has no such model or cannot be reached.
    """
    near = _near(Path(text))
    if not _may_be_an_id(text):
        raise InputError(f"There is no folder {text}{near}; {GIVE}.")
    if is_offline_mode():
        raise InputError(
            f"There is no folder {text}{near}, and the hub is not asked, since HF_HUB_OFFLINE is set; {GIVE} that was "
            "downloaded before."
        )
    told: list[Any] = []
    reason = reason_without(
        lambda api: told.append(api.model_info(text, files_metadata=True, timeout=PATIENCE)), "model"
    )
    if reason is not None:
        raise InputError(f"There is no folder {text}{near}, and {reason}; {GIVE}.")
    return told[0]


def _downloaded(adapter: str) -> Place:
    try:
        folder = snapshot_download(adapter, allow_patterns=list(FILES), ignore_patterns=["*/*"])
    except (OSError, httpx.TransportError) as error:
        raise InputError(f"The adapter {adapter} cannot be downloaded: {first_line(error)}.") from error
    return Place(str(folder), True, {})


def _of_gguf(file: Path | None) -> Place | None:
    return None if file is None else Place(str(file.parent), True, {"gguf_file": file.name}, file)


def _only_gguf(folder: Path) -> Path | None:
    """Return the GGUF file of a folder that holds no other model.

    Raises:
        InputError: there are several.
    """
    files = sorted(folder.glob("*.gguf"))
    if not files or any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        return None
    if len(files) > 1:
        raise InputError(f"The folder {folder} holds {len(files)} GGUF files; give one of them, as {files[0]}.")
    return files[0]


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
