"""Answers of a model: a conversation as token ids, and the answer as a stream of text."""
