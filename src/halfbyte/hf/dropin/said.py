"""What a translation says: once for each sentence, on standard error, as a warning of the logger ``halfbyte``."""

import logging

logger = logging.getLogger("halfbyte")

_said: set[str] = set()


def say(sentence: str) -> None:
    """Say ``sentence``, if it has not been said."""
    if sentence not in _said:
        _said.add(sentence)
        logger.warning("halfbyte: %s", sentence)


def forget() -> None:
    """Say everything anew."""
    _said.clear()
