"""The formats that a model is exported to, a table: what each holds, and which options are its own. Imports no torch.

A new format is a word in :data:`halfbyte.choices.ExportFormat`, an entry here, and its branch in
:func:`halfbyte.deploy.export.exporting.export`.
"""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from halfbyte.choices import GGUF_ADAPTER_TYPES, GGUF_TYPES, ExportFormat
from halfbyte.errors import InputError, named, nearest


@dataclass(frozen=True)
class Format:
    """A format.

    Attributes:
        to: what its weights may be in, the default first.
        options: those that belong to it and not to every format, by their names in the command line.
        needs: a package that writing it takes, and the extra of ours that installs it.
    """

    to: tuple[str, ...]
    options: frozenset[str] = frozenset()
    needs: tuple[str, str] | None = None


CALIBRATED = frozenset({"data", "rounds"})
FORMATS: dict[ExportFormat, Format] = {
    "hf": Format(("bf16", "fp16", "fp32")),
    "bnb-4bit": Format(("nf4",), frozenset({"data", "rounding"})),
    "gguf": Format(GGUF_TYPES, frozenset({"pre"})),
    "lora-gguf": Format(GGUF_ADAPTER_TYPES),
    "mlx": Format(("4bit", "8bit", "bf16", "fp16")),
    "gptq": Format(("4bit",), CALIBRATED, ("auto_round", "autoround")),
    "awq": Format(("4bit",), CALIBRATED, ("auto_round", "autoround")),
}
assert set(FORMATS) == set(get_args(ExportFormat))


def settle(name: ExportFormat, to: str | None, options: Mapping[str, Any]) -> str:
    """Check that what was asked for makes sense together, and return what the weights are to be in.

    Args:
        name: of the format.
        to: what was asked for, or None.
        options: those that belong to some formats, by their names; None where not given.

    Raises:
        InputError: it does not, or a package is missing.
    """
    form = FORMATS[name]
    if to is not None and to not in form.to:
        others = [other for other, one in FORMATS.items() if to in one.to]
        elsewhere = f"; {to} is for --format {' or '.join(others)}" if others else nearest(to, form.to)
        raise InputError(f"--format {name} has no --to {to}{elsewhere}. It has {', '.join(form.to)}.")
    for option, value in options.items():
        if value is not None and option not in form.options:
            having = named(other for other, one in FORMATS.items() if option in one.options)
            raise InputError(f"--{option} belongs to --format {having}, not to {name}; leave it out.")
    if form.needs and importlib.util.find_spec(form.needs[0]) is None:
        raise InputError(
            f"--format {name} needs {form.needs[0].replace('_', '-')}: pip install 'halfbyte[{form.needs[1]}]'."
        )
    return to or form.to[0]
