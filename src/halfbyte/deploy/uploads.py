"""What of a folder goes to the hub: the files that are named here, and no path of this machine in any of them.

    adapter   what PEFT and halfbyte open, tokenizer, template, a card      also a run's folder, a checkpoint's
    model     configuration, the weights that it opens, tokenizer, card     merged, quantized, exported
    gguf      the GGUF files, Modelfile, card

It is a list of what goes, so that what it does not know stays: optimizer state, checkpoints, rows, metrics, logs.
Settings that hold a path of this machine go as copies that hold its last part; a file that names this machine's folders
otherwise is an error.
"""

import contextlib
import json
import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import is_offline_mode
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import httpx  # type: ignore[attr-defined]
from safetensors import SafetensorError, safe_open

from halfbyte.deploy.adapter_card import adapter_card
from halfbyte.deploy.card import CARD, LICENCES, at_hub, last, licence_of
from halfbyte.errors import InputError, named
from halfbyte.hf.models.adapter_files import BESIDE
from halfbyte.hf.models.adapter_files import FILES as ADAPTER_FILES
from halfbyte.hf.models.base_format import FILE as BASE_FORMAT
from halfbyte.hf.models.check import check_finite
from halfbyte.hf.models.checkpoint import INDEX, SAFETENSORS, weight_files
from halfbyte.hf.models.configs import ADAPTER, CONFIG, json_of
from halfbyte.hf.models.fingerprint import FILE as FINGERPRINT
from halfbyte.hub import PATIENCE, asked

Kind = Literal["adapter", "model", "gguf"]

TEXTS = (*BESIDE, CARD, *LICENCES, "NOTICE", "NOTICE.txt")
MODEL = (
    CONFIG, "preprocessor_config.json", "processor_config.json", "image_processor_config.json",
    "video_preprocessor_config.json", "quantize_config.json", "quantization_config.json", SAFETENSORS + INDEX,
)  # fmt: skip
CODE = ("configuration_*.py", "modeling_*.py", "tokenization_*.py", "processing_*.py", "image_processing_*.py")
"""Of a model whose configuration names code of its own."""
SETTINGS = ("adapter_config.json", "generation_config.json", "tokenizer_config.json", *MODEL)
"""Files in which libraries write down where they read something."""
BASE = "base_model_name_or_path"
CACHED = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/")
"""A model of the hub in its cache."""
HEAD = 1 << 25
"""Bytes of a GGUF file in which its metadata is looked for."""


@dataclass(frozen=True)
class Upload:
    """A file that goes to the hub.

    Attributes:
        name: there.
        source: the file, or the bytes where they are other than the file's.
        note: what is other.
    """

    name: str
    source: Path | bytes
    note: str = ""

    @property
    def nbytes(self) -> int:
        """Its size."""
        return len(self.source) if isinstance(self.source, bytes) else self.source.stat().st_size


@dataclass(frozen=True)
class Parcel:
    """What goes to the hub.

    Attributes:
        folder: where it lies.
        kind: what it is.
        uploads: the files, weights last.
        stays: names of all else in the folder.
        base: what an adapter's base model is called there, and whether that is a hub id; empty of others.
    """

    folder: Path
    kind: Kind
    uploads: list[Upload]
    stays: list[str]
    base: str = ""
    base_is_id: bool = False

    @property
    def nbytes(self) -> int:
        """Of all files."""
        return sum(upload.nbytes for upload in self.uploads)


def parcel(folder: Path, repo_id: str, *, base: str | None = None, card: Path | None = None) -> Parcel:
    """Return what of ``folder`` goes to the hub's ``repo_id``.

    Args:
        folder: of a run or an adapter, of a model, or of GGUF files.
        repo_id: ``USER/NAME``.
        base: hub id of the base model, for an adapter's configuration and the card.
        card: a file that becomes README.md; None: an adapter's is written, another folder's is taken.

    Raises:
        InputError: there is nothing that could go, or it names a folder of this machine.
    """
    if not folder.is_dir():
        raise InputError(
            f"{folder} is {'a file' if folder.exists() else 'not there'}; give the folder of a run or model."
        )
    kind, names, weights = _content(folder)
    secret = _secrets(folder)
    own = called = ""
    is_id = True
    uploads = []
    if kind == "adapter":
        own = str(json_of(folder / ADAPTER).get(BASE) or "")
        called, is_id = _base_name(own, folder) if base is None else (base, True)
        secret |= {own} if _is_path(own) and len(Path(own).parts) > 2 else set()
    for name in names:
        uploads.append(_settled(folder / name, called if kind == "adapter" and name == ADAPTER else None))
    if card is not None:
        uploads = _with_card(uploads, _read(card), f"from {card.name}")
    elif kind == "adapter":
        text = adapter_card(folder, repo_id, called, is_id, _licence(own, called if is_id else None))
        uploads = _with_card(uploads, text.encode(), "written now")
    if kind != "adapter":
        uploads = _named_at_hub(uploads, folder, repo_id, base)
    uploads += [Upload(name, folder / name) for name in weights]
    for name in weights:
        _check_whole(folder / name, values=kind == "adapter")
    for upload in uploads:
        _check_names_nothing(upload, secret)
    going = {upload.name for upload in uploads}
    stays = sorted(f"{one.name}/" if one.is_dir() else one.name for one in folder.iterdir() if one.name not in going)
    return Parcel(folder, kind, uploads, stays, called, is_id and kind == "adapter")


def _content(folder: Path) -> tuple[Kind, list[str], list[str]]:
    """Return what a folder holds, and the names of the files that go, weights apart."""
    there = {file.name for file in folder.iterdir() if file.is_file() and not file.name.startswith(".")}
    gguf = sorted(name for name in there if name.endswith(".gguf"))
    if ADAPTER in there:
        if ADAPTER_FILES[0] not in there:
            hint = (
                f"only {ADAPTER_FILES[1]}, a pickle; save it anew" if ADAPTER_FILES[1] in there else "train to its end"
            )
            raise InputError(f"{folder} holds no {ADAPTER_FILES[0]}: {hint}.")
        kind: Kind = "adapter"
        wanted: tuple[str, ...]
        wanted, weights = (ADAPTER, BASE_FORMAT, FINGERPRINT, CONFIG, *TEXTS), [ADAPTER_FILES[0]]
    elif CONFIG in there and (not gguf or any(name.endswith(".safetensors") for name in there)):
        kind = "model"
        about = json_of(folder / CONFIG)
        weights = [file.name for file in weight_files(folder, about.get("transformers_weights"))]
        if not all(name.endswith(".safetensors") for name in weights):
            raise InputError(f"{folder} holds its weights as pickles ({named(weights)}); save it as safetensors first.")
        wanted = (*MODEL, FINGERPRINT, *(CODE if about.get("auto_map") else ()), *TEXTS)
    elif gguf:
        kind, wanted, weights = "gguf", (CONFIG, "Modelfile", *TEXTS), gguf
    else:
        raise InputError(
            f"{folder} holds no adapter ({ADAPTER}), no model ({CONFIG}) and no GGUF file, so nothing of it is "
            "uploaded; name the folder of a run that has ended, of a model, or of GGUF files."
        )
    names = sorted(name for name in there - set(weights) if any(fnmatch(name, pattern) for pattern in wanted))
    return kind, names, weights


def _check_whole(file: Path, values: bool) -> None:
    """Check that a file of weights is as long as its header says, and that the values of a small one are finite."""
    if file.suffix != ".safetensors":
        return
    try:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys() if values else ():
                check_finite(f"{file.name}: {name}", opened.get_tensor(name))
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} is damaged ({error}); copy it again, or make it anew.") from error


def _with_card(uploads: list[Upload], text: bytes, note: str) -> list[Upload]:
    return [Upload(CARD, text, note), *(upload for upload in uploads if upload.name != CARD)]


def _named_at_hub(uploads: list[Upload], folder: Path, repo_id: str, base: str | None) -> list[Upload]:
    """Return the files of a model with its new name, and the base that is given, in the card."""
    there = next((upload for upload in uploads if upload.name == CARD), None)
    if there is None and base is not None:
        raise InputError(
            f"{folder} has no card ({CARD}) that could name its base; give one (--card), or leave --base out."
        )
    if there is None:
        return uploads
    text = (there.source if isinstance(there.source, bytes) else _read(there.source)).decode(errors="surrogateescape")
    changed = at_hub(text, folder.name, repo_id, base)
    if changed == text:
        return uploads
    note = ", ".join(
        [there.note] * bool(there.note) + ["its name on the hub" if base is None else f"base_model: {base}"]
    )
    return _with_card(uploads, changed.encode(errors="surrogateescape"), note)


def _read(card: Path) -> bytes:
    try:
        return card.read_bytes()
    except OSError as error:
        raise InputError(f"The card {card} cannot be read ({error.strerror}).") from error


def _licence(own: str, base_id: str | None) -> str | None:
    """Return the licence of an adapter's base: as its folder says, or else the hub, if that answers."""
    if os.path.isdir(own):
        return licence_of(Path(own))
    if base_id is None or is_offline_mode():
        return None
    with contextlib.suppress(OSError, httpx.HTTPError, HFValidationError):
        about = asked(lambda api: api.model_info(base_id, timeout=PATIENCE)).card_data
        told = about.get("license") if about else None
        return told if isinstance(told, str) else None
    return None


def _base_name(own: str, folder: Path) -> tuple[str, bool]:
    """Return what an adapter's base is called elsewhere, and whether that is a hub id."""
    if not own:
        raise InputError(f"{folder / ADAPTER} names no base model ({BASE}); say which it is with --base.")
    if cached := CACHED.search(own):
        return f"{cached[1]}/{cached[2]}", True
    return (last(own), False) if _is_path(own) else (own, True)


def _settled(file: Path, base: str | None) -> Upload:
    """Return a file as it goes: settings without paths of this machine, and with the ``base`` that is given."""
    if file.name not in SETTINGS:
        return Upload(file.name, file)
    about = json_of(file)
    changed = _without_paths(about)
    if base is not None:
        changed[BASE] = base
    if changed == about:
        return Upload(file.name, file)
    note = ", ".join(f"{key}: {value}" for key, value in _differing(about, changed)) or "paths cut"
    return Upload(file.name, (json.dumps(changed, indent=2, ensure_ascii=False) + "\n").encode(), note)


def _without_paths(value: Any, key: str = "") -> Any:
    """Return a value of JSON with the last part alone of each path in it, or the hub id of one in the hub's cache."""
    if isinstance(value, dict):
        return {
            name: one if name == "added_tokens_decoder" else _without_paths(one, name) for name, one in value.items()
        }
    if isinstance(value, list):
        return [_without_paths(one) for one in value]
    if not isinstance(value, str) or not _is_path(value, is_named=key.endswith(("_or_path", "_file", "_path", "_dir"))):
        return value
    cached = CACHED.search(value)
    return f"{cached[1]}/{cached[2]}" if cached and key.endswith("_or_path") else last(value)


def _is_path(text: str, is_named: bool = True) -> bool:
    """Tell whether a text is a path of this machine.

    Args:
        text: the text.
        is_named: whether it stands where a path or a hub id is to be; else it has to look like nothing else.
    """
    if not text or "\n" in text or (" " in text.strip() and not is_named):
        return False
    if re.match(r"(/|~|\.{1,2}/|file:/|[A-Za-z]:[\\/]|\\\\)", text):
        return is_named or len(re.findall(r"[^/\\]+", text)) > 1
    return is_named and (os.path.isdir(text) or "\\" in text)


def _differing(before: Any, after: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(before, dict):
        for key, value in after.items():
            if isinstance(value, dict) and isinstance(before.get(key), dict):
                yield from _differing(before[key], value)
            elif value != before.get(key):
                yield key, value


def _secrets(folder: Path) -> set[str]:
    """Return the paths that no file may hold: of two parts at least, which no text has by chance."""
    home = Path.home()
    found = {folder.absolute(), folder.resolve(), folder.resolve().parent, home, home.resolve()}
    return {str(path) for path in found if len(path.parts) > 2}


def _check_names_nothing(upload: Upload, secrets: set[str]) -> None:
    head = _head(upload)
    for path in sorted(secrets, key=len):
        if path.encode() in head or json.dumps(path)[1:-1].encode() in head:
            also = ", or give a card of your own (--card)" if upload.name == CARD else ""
            raise InputError(
                f"{upload.name} holds {path}, a folder of this machine, so nothing is uploaded; take that out{also}."
            )


def _head(upload: Upload) -> bytes:
    """Return what of a file may hold texts: of weights what stands before them."""
    if isinstance(upload.source, bytes):
        return upload.source
    with upload.source.open("rb") as file:
        if upload.name.endswith(".safetensors"):
            size = file.read(8)
            return file.read(min(struct.unpack("<Q", size)[0], HEAD)) if len(size) == 8 else b""
        return file.read(HEAD)
