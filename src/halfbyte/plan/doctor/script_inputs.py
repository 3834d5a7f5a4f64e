"""The models and data that a script names: here, on the hub, or nowhere; and whether this machine can hold them."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from halfbyte.errors import InputError, size_text
from halfbyte.hf.models.hub import described
from halfbyte.memory import free_memory
from halfbyte.plan.doctor.finding import Finding
from halfbyte.plan.doctor.hub_model import told_of
from halfbyte.plan.doctor.reading import Call, Script, texts
from halfbyte.plan.doctor.storage import hub_cache
from halfbyte.plan.size import checkpoint_size
from halfbyte.runs.circumstances import folder_of

LOADING = ("from_pretrained", "load_dataset", "pipeline", "snapshot_download")
BUILDERS = ("json", "csv", "parquet", "text", "arrow", "imagefolder", "audiofolder", "webdataset", "pandas")
"""Names of kinds of files that ``load_dataset`` takes in the place of a name."""
ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
ASKED = 3
"""Models at most of which the hub is asked."""
OF_TRAINING = 4.5 / 8
"""Bytes a parameter of a base in 4 bits, with what stays in 16."""
DENSE = 2.0


def models(script: Script, folder: Path) -> Iterator[Finding]:
    """Yield what is the matter with the models that a script loads.

    Args:
        script: it.
        folder: its, where paths begin.
    """
    seen: set[str] = set()
    asked = 0
    quantizes = any(call.last == "BitsAndBytesConfig" or "load_in_4bit" in call.keywords for call in script.calls)
    for call in script.calls:
        name = _model(call)
        if name is None or name in seen:
            continue
        seen.add(name)
        here = folder_of(str(folder / name) if (folder / name).exists() else name)
        if here.exists():
            yield from _room(call, name, here, quantizes)
        elif _written_by(script, name):
            continue  # what the script itself saves before
        elif not ID.fullmatch(name) or name.count("/") != 1:
            yield _absent(call, name, "There is no such folder.", "Give the folder of a model, or an id of the hub.")
        elif asked < ASKED:
            asked += 1
            yield from _of_hub(call, name)


def _model(call: Call) -> str | None:
    """Return which model a call loads, if that stands in the script."""
    if call.last == "from_pretrained" or call.last.endswith("Trainer"):
        given = call.arguments[0] if call.arguments else None
        for key in ("pretrained_model_name_or_path", "model"):
            given = call.keywords.get(key, given)
        return (
            given if isinstance(given, str) and given and not given.startswith("torch.") and "\n" not in given else None
        )
    return None


def _written_by(script: Script, name: str) -> bool:
    saving = ("save_pretrained", "save_model", "TrainingArguments", "SFTConfig", "DPOConfig", "KTOConfig")
    saved = [
        text
        for call in script.calls
        if call.last in saving
        for text in texts([*call.arguments, *call.keywords.values()])
    ]
    return any(name == text or name.startswith(f"{text.rstrip('/')}/") for text in saved if text)


def _room(call: Call, name: str, here: Path, quantizes: bool) -> Iterator[Finding]:
    try:
        size = checkpoint_size(here) if here.is_dir() else None
    except Exception:  # a damaged file: halfbyte doctor MODEL says more
        size = None
    if size is None or not size.elements:
        yield Finding("models", f"{call.place}: {name} is on this machine")
        return
    needed = int(size.elements * (OF_TRAINING if quantizes else DENSE))
    free = free_memory()
    value = f"{call.place}: {name} is on this machine, {size.elements:,} parameters"
    if needed > free:
        yield Finding(
            "models",
            f"{value}: about {size_text(needed)} {'in 4 bits' if quantizes else 'in 16 bits'}, {size_text(free)} free",
            "Loading it ends the process, or pages." if not quantizes else "The base is then paged from the disk.",
            "quantization_config=BitsAndBytesConfig(load_in_4bit=True)" if not quantizes else "Take a smaller model.",
            "warning",
        )
    else:
        yield Finding("models", value)


def _of_hub(call: Call, name: str) -> Iterator[Finding]:
    try:
        about = described(name)
    except InputError as error:
        yield _absent(call, name, str(error), f"hf download {name}")
        return
    for finding in told_of(name, about, hub_cache()):
        yield Finding("models", f"{call.place}: {finding.value}", finding.why, finding.fix, finding.level)


def _absent(call: Call, name: str, why: str, fix: str) -> Finding:
    return Finding("models", f"{call.place}: {name} is not on this machine", why, fix, "warning")


def data(script: Script, folder: Path) -> Iterator[Finding]:
    """Yield what is the matter with the data that a script loads.

    Args:
        script: it.
        folder: where the script lies; paths begin where it is started.
    """
    for call in script.calls:
        if call.last != "load_dataset":
            continue
        given = [call.arguments[0] if call.arguments else None, call.keywords.get("path")]
        name = next((one for one in given if isinstance(one, str)), None)
        if name is None:
            continue
        if name in BUILDERS:
            yield from _files(call, folder)
        elif not Path(name).exists() and not (folder / name).exists() and not _is_cached(name):
            yield Finding(
                "data",
                f"{call.place}: load_dataset({name!r}) is not on this machine",
                "It is downloaded when the script runs; without the hub the script ends there.",
                f"hf download --repo-type dataset {name}",
                "note",
            )


def _files(call: Call, folder: Path) -> Iterator[Finding]:
    for file in texts(call.keywords.get("data_files")):
        is_pattern = "*" in file or "://" in file
        if not is_pattern and not Path(file).expanduser().exists():
            beside = (folder / file).exists()
            yield Finding(
                "data",
                f"{call.place}: {file} is not in this folder{', but beside the script' if beside else ''}",
                "Paths begin where the script is started; it ends there with a FileNotFoundError.",
                f"cd {folder}" if beside else "Put the file there, or give its whole path.",
                "warning" if beside else "fault",
            )


def _is_cached(name: str) -> bool:
    """Whether the hub's cache, or that of datasets, has a data set."""
    from datasets import config

    ours: list[Any] = [
        hub_cache() / f"datasets--{name.replace('/', '--')}",
        Path(os.fspath(config.HF_DATASETS_CACHE)) / name.replace("/", "___"),
    ]
    return any(Path(folder).is_dir() for folder in ours)
