"""Configurations of axolotl and LLaMA-Factory as ours. Imports no torch.

keys            what becomes of a key, and a configuration under way
axolotl         its table
llama_factory   its two tables: of the names that all know, and of version 1's
"""

from pathlib import Path

from halfbyte.errors import InputError
from halfbyte.files import absolute
from halfbyte.options import read_mapping
from halfbyte.runs.convert import axolotl, llama_factory
from halfbyte.runs.convert.keys import Converted, Tool, convert_keys

TOOLS: tuple[Tool, ...] = (axolotl.TOOL, llama_factory.TOOL, llama_factory.VERSION_1)


def convert(path: str | Path) -> Converted:
    """Read a configuration of another tool and return it as ours.

    Raises:
        InputError: it cannot be read, is of no tool that is known, or is no training of adapters.
    """
    values = {str(key): value for key, value in read_mapping(absolute(path)).items()}
    tool = next((tool for tool in TOOLS if any(mark <= values.keys() for mark in tool.marks)), None)
    if tool is None:
        raise InputError(
            f"{path} is no configuration of axolotl (base_model, adapter ...) or of LLaMA-Factory (model_name_or_path, "
            "finetuning_type ...), which are those that can be converted."
        )
    return convert_keys(tool, values, absolute(path))
