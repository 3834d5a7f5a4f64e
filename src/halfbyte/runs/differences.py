"""Which options of a run say something: those that are other than its preset, method and number format would have.

They are what one writes to have the same run again. Options are taken as ``config.yaml`` has them, data whose files are
gone included, so nothing is looked up.
"""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

from halfbyte.choices import QUANT_TYPE
from halfbyte.errors import InputError
from halfbyte.options import base_format
from halfbyte.runs.config import METHOD_DEFAULTS, PRESETS, TrainConfig

FIRST = ("model", "data", "eval_data", "output", "method", "task", "preset")
"""What a reader looks for first; the rest stands as in :class:`TrainConfig`."""


def defaults_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return what each option is that nobody gave, by the preset, method and number format of ``options``."""
    fields = TrainConfig.model_fields
    values = {name: field.default for name, field in fields.items() if not field.is_required()}
    preset, method = str(options.get("preset", "paper")), str(options.get("method", "sft"))
    values |= PRESETS.get(preset, {}) | METHOD_DEFAULTS.get((method, preset.partition("-")[0]), {})
    with contextlib.suppress(InputError):  # of a format that this version does not know
        values["blocksize"], values["double_quant"] = base_format(str(options.get("quant_type", QUANT_TYPE)))
    return values


def given(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that are other than :func:`defaults_of` says, and those that this version does not know."""
    usual = defaults_of(options)
    names = [*FIRST, *(name for name in TrainConfig.model_fields if name not in FIRST)]
    names += [name for name in options if name not in TrainConfig.model_fields]
    missing = object()
    return {name: options[name] for name in names if name in options and options[name] != usual.get(name, missing)}


def differing(many: Sequence[Mapping[str, Any]], leave_out: Sequence[str] = ("output",)) -> dict[str, list[Any]]:
    """Return the options in which runs differ, each with its value in every run; None where it has none."""
    names = list(dict.fromkeys(name for options in many for name in options))
    rows = {name: [options.get(name) for options in many] for name in names if name not in leave_out}
    return {name: values for name, values in rows.items() if any(value != values[0] for value in values)}
