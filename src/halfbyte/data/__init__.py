"""Data to batches, each step in a file of its own, a row at a time until they are on the disk again:

``sources`` (what a user names) → ``readers`` (files to rows) → ``formats`` (rows to ``examples``) → ``template`` (a
conversation as text) → ``tokens`` (ids and labels) → ``table`` (all of them, memory-mapped) → ``collate`` (a batch).
``prepared`` goes the whole way and keeps its result (``cache``); ``options`` are what a user says of it.

Names are imported when first used, so that options can be read without torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from halfbyte.data.collate import Collator, Packer
    from halfbyte.data.collate_answers import JudgedCollator, PairCollator
    from halfbyte.data.examples import BadRow, Chat, Completion, Example, Judged, Message, Preference, Text
    from halfbyte.data.options import DataOptions
    from halfbyte.data.packing import PackingPlan, plan_packing
    from halfbyte.data.prepared import Prepared, equip, prepare, read_examples
    from halfbyte.data.readers import read_rows
    from halfbyte.data.sources import Source, named_sources
    from halfbyte.data.table import Tokenized, tokenize
    from halfbyte.data.template import chat_template
    from halfbyte.data.tokens import Row, decode_trained, encode_examples

_HOMES = {
    "Collator": "collate", "Packer": "collate",
    "JudgedCollator": "collate_answers", "PairCollator": "collate_answers",
    "BadRow": "examples", "Chat": "examples", "Completion": "examples", "Example": "examples",
    "Judged": "examples", "Message": "examples", "Preference": "examples", "Text": "examples",
    "DataOptions": "options",
    "Prepared": "prepared", "equip": "prepared", "prepare": "prepared", "read_examples": "prepared",
    "read_rows": "readers",
    "PackingPlan": "packing", "plan_packing": "packing",
    "Source": "sources", "named_sources": "sources",
    "Tokenized": "table", "tokenize": "table",
    "chat_template": "template",
    "Row": "tokens", "decode_trained": "tokens", "encode_examples": "tokens",
}  # fmt: skip

__all__ = [
    "BadRow",
    "Chat",
    "Collator",
    "Completion",
    "DataOptions",
    "Example",
    "Judged",
    "JudgedCollator",
    "Message",
    "Packer",
    "PackingPlan",
    "PairCollator",
    "Preference",
    "Prepared",
    "Row",
    "Source",
    "Text",
    "Tokenized",
    "chat_template",
    "decode_trained",
    "encode_examples",
    "equip",
    "named_sources",
    "plan_packing",
    "prepare",
    "read_examples",
    "read_rows",
    "tokenize",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
