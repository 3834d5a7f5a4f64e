"""What the second station asks for, as options of a run: every path within the page's folders, no word unknown."""

import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from halfbyte.data.sources import HUB_ID, inputs_of, resolve
from halfbyte.deploy.ui import found, uploads
from halfbyte.deploy.ui.places import Outside, Places
from halfbyte.deploy.ui.texts import say
from halfbyte.errors import InputError
from halfbyte.options import NO_YAML
from halfbyte.runs.config import PRESETS, TrainConfig

FILES = {"adapter", "chat_template", "forgetting_data", "new_tokens", "sample_prompts"}
"""Options that may name a file or a folder, or something else; ``replay`` names data."""
REFUSED = {"trust_remote_code", "output", "model", "data", "resume", "overwrite", "ray", "report_to", "processes"}
"""Options that have a place of their own in the page, or that nobody should set from one."""
NUMBERS = ("epochs", "max_length", "rank", "learning_rate", "batch_size", "eval_share")
ANSWERS = {"sft": "completion", "dpo": "chosen", "orpo": "chosen", "kto": "completion", "text": "text"}
MODEL_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


class _Plain(yaml.SafeLoader):
    """YAML without aliases, of which a few lines make what has no end."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Return the next node."""
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("an alias")
        return super().compose_node(parent, index)


def numbers_of(preset: str) -> dict[str, Any]:
    """Return what a recipe says of the numbers that the page asks for."""
    fields = TrainConfig.model_fields
    values = {name: PRESETS[preset].get(name, fields[name].default) for name in NUMBERS}
    return values | {"eval_share": values["eval_share"] or 0.1, "epochs": PRESETS[preset].get("epochs", 3)}


def options_of(places: Places, language: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a run.

    Args:
        places: the page's folders.
        language: in which to say what is wrong.
        given: what stands in the page, by the names of its fields.

    Raises:
        InputError: something lacks, leads elsewhere, or is no option.
    """
    given = {name: "" if value is None else value for name, value in given.items()}
    options: dict[str, Any] = {
        "model": model_of(places, language, given["model"]),
        "data": data_of(places, language, given),
    }
    options |= {name: given[name] for name in ("method", "task", "preset")}
    for name in NUMBERS:
        value = given.get(name)
        if value is not None and value != "":
            whole = name not in ("epochs", "learning_rate", "eval_share")
            options[name] = int(value) if whole else float(value)
    if not options.get("eval_share"):
        options.pop("eval_share", None)
    if given["task"] != "lm":
        options.pop("method")
    if given["memory"].strip():
        options["memory"] = given["memory"].strip()
    columns = _columns(given)
    if columns:
        options["columns"] = columns
    if given.get("skip"):
        options["skip_bad_rows"] = "all"
    if options["preset"] == "quick":
        options.setdefault("gradient_accumulation_steps", 1)
    return options | further(places, language, given.get("yaml") or "")


def model_of(places: Places, language: str, name: str | None) -> str:
    """Return the model that is meant: one that was found, a folder within the page's, or a hub id.

    Raises:
        InputError: it is none of these.
    """
    text = (name or "").strip()
    if not text:
        raise InputError(say(language, "say.no_model"))
    known = {model.name: model.path for model in found.models(places)}
    if text in known or text in known.values():
        return _whole(places, known.get(text, text))
    inside = _if_inside(places, text)
    if inside is not None and os.path.exists(inside):
        return _whole(places, str(inside))
    is_name = MODEL_ID.fullmatch(text) and ".." not in text
    if is_name and not _is_there(places, text):
        return text
    places.inside(text)
    raise InputError(f"There is no model {text}.")


def data_of(places: Places, language: str, given: Mapping[str, Any]) -> list[str]:
    """Return the data that are meant: files that were sent, rows that were pasted, a path or a name.

    Raises:
        InputError: there are none, or they lie elsewhere.
    """
    words = [str(uploads.kept(places, Path(file))) for file in given.get("files") or ()]
    if (given.get("paste") or "").strip():
        words.append(str(uploads.pasted(places, given["paste"])))
    for line in (given.get("path") or "").splitlines():
        if line.strip():
            words.append(_source(places, line.strip()))
    if not words:
        raise InputError(say(language, "say.no_data"))
    return words


def further(places: Places, language: str, text: str) -> dict[str, Any]:
    """Return options that are written out, a line each.

    Raises:
        InputError: they are no YAML, unknown, or not for a page.
    """
    if not text.strip():
        return {}
    try:
        found_ = yaml.load(text, _Plain)
    except NO_YAML as error:
        mark = getattr(error, "problem_mark", None)
        raise InputError(say(language, "say.bad_option", line=mark.line + 1 if mark else 1)) from None
    if not isinstance(found_, dict):
        raise InputError(say(language, "say.bad_option", line=1))
    options = {str(name): value for name, value in found_.items()}
    for name, value in options.items():
        if name in REFUSED:
            raise InputError(f"{name} cannot be set here.")
        if name == "replay" and isinstance(value, str):
            file, star, share = value.strip().rpartition("*")
            options[name] = f"{_source(places, file)}{star}{share}" if star else value
        elif name in FILES and isinstance(value, str):
            options[name] = _file(places, value)
        elif name not in FILES:
            _check_paths(places, value)
    return options


def command_of(options: Mapping[str, Any], output: Path) -> str:
    """Return the command that does the same."""
    words = ["halfbyte", "train"]
    for name, value in {**options, "output": str(output)}.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        elif isinstance(value, Mapping):
            words += [flag, ",".join(f"{key}={x}" for key, x in value.items())]
        else:
            for one in value if isinstance(value, list) else [value]:
                words += [flag, str(one)]
    return shlex.join(words)


def _columns(given: Mapping[str, Any]) -> dict[str, str]:
    method, task = given["method"], given["task"]
    answer = ANSWERS[method] if task == "lm" else "completion"
    names = {"prompt": "text" if task == "classify" or method == "text" else "prompt", "completion": answer}
    names |= {"rejected": "rejected", "label": "label"}
    chosen = {names[name]: given[name] for name in names if given.get(name)}
    return {name: column for name, column in chosen.items() if column}


def _source(places: Places, word: str) -> str:
    name, at, weight = word.rpartition("@")
    path = name if at and re.fullmatch(r"[\d.]+|\w+", weight) else word
    inside = _if_inside(places, path, sent=True)
    if inside is not None and (os.path.exists(inside) or any(sign in path for sign in "*?[")):
        source = f"{inside}{at}{weight}" if path != word else str(inside)
        for file in inputs_of(resolve(source)):  # links lead anywhere
            places.inside(file, sent=True)
        return source
    is_name = (HUB_ID.fullmatch(word) and ".." not in word) or re.fullmatch(r"[\w-]+", word)
    if is_name and not _is_there(places, path):
        return word
    places.inside(path, sent=True)
    raise InputError(f"There is no {path} in the folders of this page.")


def _file(places: Places, value: str) -> str:
    """Return a value that may be a path as the run is to read it.

    Raises:
        Outside: it is one, and leads out of the page's folders.
    """
    inside = _if_inside(places, value)
    if inside is not None and os.path.exists(inside):
        return str(inside)
    path = Path(os.path.expanduser(value.strip()))
    if path.is_absolute() or ".." in path.parts or os.path.exists(path):
        raise Outside(value)
    return value


def _check_paths(places: Places, value: Any) -> None:
    """Refuse values that lead out of the page's folders, also where no option reads such.

    Raises:
        Outside: one does.
    """
    if isinstance(value, Mapping | list):
        for one in value.values() if isinstance(value, Mapping) else value:
            _check_paths(places, one)
    elif isinstance(value, str):
        _file(places, value)


def _whole(places: Places, path: str) -> str:
    """Return the path of a model; one in the page's folders whose files are links that lead out of them is refused.

    Raises:
        Outside: it is such a one.
    """
    if os.path.isdir(path) and any(Path(path).is_relative_to(root) for root in places.roots):
        for file in os.listdir(path):
            places.inside(Path(path, file))
    return path


def _is_there(places: Places, path: str) -> bool:
    """Tell whether what could be a name is a path in one of the folders, or where the server was started."""
    return any(os.path.lexists(folder / path) for folder in (Path(), *places.roots))


def _if_inside(places: Places, path: str, *, sent: bool = False) -> Path | None:
    try:
        return places.inside(path, sent=sent)
    except Outside:
        return None
