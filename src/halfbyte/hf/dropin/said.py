"""What a translation says: once for each sentence, on standard error, as a warning of the logger ``halfbyte``.

Of several processes on a machine (torchrun) the first says it.
"""

import logging
import os

logger = logging.getLogger("halfbyte")

_said: set[str] = set()


def say(sentence: str) -> None:
    """Say ``sentence``, if it has not been said."""
    if sentence not in _said and os.environ.get("LOCAL_RANK", "0") == "0":
        _said.add(sentence)
        logger.warning("halfbyte: %s", sentence)


def forget() -> None:
    """Say everything anew."""
    _said.clear()
