"""What happens when a mapped file cannot be read any more (csrc/bus.h)."""

from halfbyte.kernels.native.runtime import available, extension


def tell_bus_error(text: str, code: int) -> None:
    """From now on print ``text`` and end the process with ``code`` where the system would kill it without a word.

    It does so when a file that is mapped becomes shorter, or its disk fails, and what is gone is touched. Without the
    extension nothing changes.
    """
    if available():
        extension.tell_bus_error(text, code)
