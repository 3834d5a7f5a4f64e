"""Placeholder: the rows come with another change."""

from halfbyte.hf.replacement import Replacement


def rows() -> list[Replacement]:
    """There are none yet."""
    return []
