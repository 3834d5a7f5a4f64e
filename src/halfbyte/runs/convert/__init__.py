"""Configurations of axolotl and LLaMA-Factory as ours. Imports no torch.

keys            what becomes of a key, and a configuration under way
axolotl         its table
llama_factory   its two tables: of the names that all know, and of version 1's
"""

from pathlib import Path
from typing import Any

import yaml

from halfbyte.errors import InputError
from halfbyte.files import absolute
from halfbyte.runs.convert import axolotl, llama_factory
from halfbyte.runs.convert.keys import Converted, Tool, convert_keys

TOOLS: tuple[Tool, ...] = (axolotl.TOOL, llama_factory.TOOL, llama_factory.VERSION_1)


def convert(path: str | Path) -> Converted:
    """Read a configuration of another tool and return it as ours.

    Raises:
        InputError: it cannot be read, is of no tool that is known, or is no training of adapters.
    """
    values = _read(absolute(path))
    tool = next((tool for tool in TOOLS if any(mark <= values.keys() for mark in tool.marks)), None)
    if tool is None:
        raise InputError(
            f"{path} is no configuration of axolotl (base_model, adapter ...) or of LLaMA-Factory (model_name_or_path, "
            "finetuning_type ...), which are those that can be converted."
        )
    return convert_keys(tool, values, absolute(path))


def _read(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot read the configuration: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" (line {mark.line + 1})" if mark else ""
        raise InputError(f"{path}: this is not YAML{line}.") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected 'key: value' lines, found {type(values).__name__}.")
    return {str(key): value for key, value in values.items()}
