"""Data files to examples (``formats``), to token ids and labels (``tokens``), to batches (``collate``)."""

from halfbyte.data.collate import Collator
from halfbyte.data.formats import Chat, Completion, Example, Text, read_examples
from halfbyte.data.tokens import Tokenized, chat_template, decode_trained, tokenize

__all__ = [
    "Chat",
    "Collator",
    "Completion",
    "Example",
    "Text",
    "Tokenized",
    "chat_template",
    "decode_trained",
    "read_examples",
    "tokenize",
]
