"""Answers of a model: a conversation as token ids, the answer as a stream of text, and the classes of texts."""

from halfbyte.generate.classify import Named, classify_texts
from halfbyte.generate.stream import check_generates, stream_reply

__all__ = ["Named", "check_generates", "classify_texts", "stream_reply"]
