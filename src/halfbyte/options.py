"""Options that come from YAML, flags or a script, each wrong one told in one sentence. Imports no torch."""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from halfbyte.choices import (
    BLOCKSIZE,
    BLOCKSIZES,
    DOUBLE_QUANT,
    QUANT_TYPES,
    ROW,
    STARTS,
    STARTS_REFUSED,
    TYPES_4BIT,
)
from halfbyte.errors import InputError, nearest
from halfbyte.files import absolute

NO_YAML = (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError)
"""What PyYAML raises for what it cannot read; of a date that is none, whatever Python says."""


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
        written = {} if path is None else read_mapping(absolute(path))
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


def base_format(
    quant_type: str, blocksize: int | str | None = None, double_quant: bool | None = None
) -> tuple[int | str | None, bool]:
    """Return block size and double quantization of a base's number format, defaults filled in.

    Args:
        quant_type: one of ``QUANT_TYPES``.
        blocksize: values per block, ``row`` (int8 alone), or None: 64, and no blocks for ``none``.
        double_quant: whether block constants are quantized too; None: they are in 4 bits.

    Raises:
        InputError: an unknown word, a size out of bounds, or options that contradict each other.
    """
    if quant_type not in QUANT_TYPES:
        raise InputError(
            f"quant_type is {quant_type!r}{nearest(quant_type, QUANT_TYPES)}; it must be one of "
            f"{', '.join(QUANT_TYPES)}."
        )
    if double_quant and quant_type not in TYPES_4BIT:
        raise InputError(
            f"double_quant is for 4 bits, and quant_type is {quant_type}, "
            f"{'which has no constants' if quant_type == 'none' else 'whose constants stay as they are'}; leave it out."
        )
    if quant_type == "none":
        if blocksize is not None:
            raise InputError(f"blocksize is {blocksize!r}, but with quant_type none there are no blocks; leave it out.")
        return None, False
    blocksize = BLOCKSIZE if blocksize is None else blocksize
    if blocksize == ROW and quant_type != "int8":
        raise InputError(f"blocksize is {ROW!r}, which is for int8; with {quant_type} it must be a number.")
    if blocksize != ROW and blocksize not in BLOCKSIZES:
        rows = f", or {ROW!r}" if quant_type == "int8" else ""
        raise InputError(f"blocksize is {blocksize!r}; it must be {BLOCKSIZES[0]} to {BLOCKSIZES[-1]}{rows}.")
    return blocksize, DOUBLE_QUANT and quant_type in TYPES_4BIT if double_quant is None else double_quant


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
    """Whether an adapter begins with a part of the weight, which is subtracted again: without DoRA."""
    return start.startswith(("pissa", "olora"))


def read_mapping(path: Path) -> dict[str, Any]:
    """Read a mapping in YAML.

    Raises:
        InputError: it cannot be read, or is none.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot read the configuration: {error.strerror}.") from None
    except NO_YAML as error:
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
    near = nearest(first["input"], _words(error.errors(), key)) if isinstance(first["input"], str) else ""
    return f"{place.get(key, '')}option {name!r}: {first['input']!r} is wrong, it {problem}{near}."


def _words(errors: list[ErrorDetails], key: str) -> list[str]:
    """Return the words that an option may be, by what pydantic (2) expected."""
    expected = [each["ctx"]["expected"] for each in errors if each["type"] == "literal_error" and each["loc"][0] == key]
    return [word for text in expected for word in re.findall(r"'([^']*)'", text)]


def _problem(error: ErrorDetails) -> str:
    return error["msg"].removeprefix("Value error, ").removeprefix("Input ").partition(", unable to ")[0]
