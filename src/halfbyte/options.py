"""Options that come from YAML, flags or a script, each wrong one told in one sentence. Imports no torch."""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from halfbyte.choices import STARTS, STARTS_REFUSED
from halfbyte.errors import InputError, nearest
from halfbyte.files import absolute


class Options(BaseModel):
    """A set of options; its fields are their names, types, bounds, defaults and meaning."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @classmethod
    def from_yaml(
        cls,
        path: str | Path | None,
        overrides: Mapping[str, Any] | None = None,
        *,
        besides: Collection[str] = (),
    ) -> Self:
        """Read the options in the file at ``path`` (none if ``None``); those in ``overrides`` win.

        Options of the file that are ``besides`` these are left out.

        Raises:
            InputError: the file cannot be read or is not a YAML mapping, or an option is unknown, missing or wrong.
        """
        written = {} if path is None else _read_mapping(absolute(path))
        written = {key: value for key, value in written.items() if key in cls.model_fields or key not in besides}
        given = written | dict(overrides or {})
        place = {key: f"{path}: " for key in written if key not in (overrides or {})}
        for key in given:
            if key not in cls.model_fields:
                raise InputError(f"{place.get(key, '')}unknown option {key!r}{nearest(str(key), cls.model_fields)}.")
        try:
            return cls(**given)
        except ValidationError as error:
            raise InputError(_sentence(error, place, cls)) from None


def not_empty(name: Any) -> Any:
    """Return ``name``, if it says anything; for validators."""
    if not str(name).strip():
        raise ValueError("must not be empty")
    return name


def check_start(name: str) -> str:
    """Return the name of a way in which an adapter begins, if there is one.

    Raises:
        InputError: there is none, or it is one that does not run over 4-bit weights.
    """
    if name in STARTS_REFUSED:
        raise InputError(f"init_lora_weights {name!r} does not run over 4-bit weights: {STARTS_REFUSED[name]}.")
    if name not in STARTS and not re.fullmatch(r"pissa_niter_[1-9]\d?", name):
        raise InputError(
            f"there is no init_lora_weights {name!r}{nearest(name, STARTS)}; there is {', '.join(STARTS)} (4 or "
            "another number of iterations)."
        )
    return name


def is_subtracted(start: str) -> bool:
    """Whether an adapter begins with a part of the weight, which is subtracted again: without dropout or DoRA."""
    return start.startswith(("pissa", "olora"))


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot read the configuration: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" (line {mark.line + 1})" if mark else ""
        raise InputError(f"{path}: this is not YAML{line}; write one 'option: value' per line.") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected 'option: value' lines, found {type(values).__name__}.")
    return values


def _sentence(error: ValidationError, place: Mapping[str, str], options: type[BaseModel]) -> str:
    first = error.errors()[0]
    if not first["loc"]:
        return f"{first['ctx']['error']}."
    key = str(first["loc"][0])
    if first["type"] == "missing":
        return f"option {key!r} is missing: {options.model_fields[key].description}"
    if isinstance(told := first.get("ctx", {}).get("error"), InputError):
        return f"{place.get(key, '')}option {key!r}: {told}"
    same = [each for each in error.errors() if each["loc"][0] == key and each["input"] == first["input"]]
    if len(same) > 1:  # the members of a union, each with its own reason
        name, problem = key, "should " + " or ".join(_problem(each).removeprefix("should ") for each in same)
    else:
        name, problem = ".".join(str(part) for part in first["loc"] if isinstance(part, str)), _problem(first)
    return f"{place.get(key, '')}option {name!r}: {first['input']!r} is wrong, it {problem}."


def _problem(error: ErrorDetails) -> str:
    return error["msg"].removeprefix("Value error, ").removeprefix("Input ").partition(", unable to ")[0]
