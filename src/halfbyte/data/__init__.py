"""Data files to batches, each step in a file of its own, a row at a time until they are on the disk again:

``readers`` (files to rows) → ``formats`` (rows to examples) → ``template`` (a conversation as text) → ``tokens`` (ids
and labels) → ``table`` (all of them, memory-mapped) → ``collate`` (a batch).
"""

from halfbyte.data.collate import Collator
from halfbyte.data.formats import Chat, Completion, Example, Text, read_examples
from halfbyte.data.readers import named
from halfbyte.data.table import Tokenized, tokenize
from halfbyte.data.template import chat_template
from halfbyte.data.tokens import Row, decode_trained, encode_examples

__all__ = [
    "Chat",
    "Collator",
    "Completion",
    "Example",
    "Row",
    "Text",
    "Tokenized",
    "chat_template",
    "decode_trained",
    "encode_examples",
    "named",
    "read_examples",
    "tokenize",
]
