"""Answers of a model: a conversation as token ids, and the answer as a stream of text."""

from halfbyte.generate.stream import stream_reply

__all__ = ["stream_reply"]
