"""Objects of ``torch.cuda`` that a script makes where there is no GPU: generators, events that take the time, devices.

Each class stays one whose instances are torch's (``isinstance`` and what C++ is handed); only what the script makes of
it with a CUDA device is another.
"""

import functools
import sys
import time
from collections.abc import Callable
from typing import Any

from halfbyte.hf.dropin.callers import is_users, is_wish_of_user
from halfbyte.hf.dropin.said import say


class _SameInstances(type):
    """A class that makes instances of ``old``, all of which are its own."""

    old: type

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, cls.old)


def generator(is_cuda: Callable[[Any], bool]) -> Callable[[Any], Any]:
    """``torch.Generator``, on the CPU where the script wishes one on a CUDA device."""

    def make(old: Any) -> Any:
        class Generator(metaclass=_SameInstances):
            def __new__(cls, device: Any = "cpu") -> Any:
                if is_cuda(device) and is_users(sys._getframe(1)):
                    say('torch.Generator("cuda"): there is no GPU, so it is the CPU\'s.')
                    device = "cpu"
                return old(device)

        Generator.old = old
        return Generator

    return make


class Event:
    """A point in time, for scripts that take the time of what they do; of ``torch.cuda.Event`` what they use."""

    def __init__(self) -> None:
        self.time: float | None = None

    def record(self, stream: Any = None) -> None:
        """Be now."""
        self.time = time.perf_counter()

    def elapsed_time(self, end_event: "Event") -> float:
        """Return the milliseconds between this and ``end_event``."""
        if self.time is None or end_event.time is None:
            raise ValueError("Both events must be recorded before calculating elapsed time.")
        return (end_event.time - self.time) * 1e3

    def query(self) -> bool:
        """Return that all is done: there is nothing in flight on a CPU."""
        return True

    def synchronize(self) -> None:
        """Wait for nothing."""

    def wait(self, stream: Any = None) -> None:
        """Wait for nothing."""


def event(old: Any) -> Any:
    """``torch.cuda.Event``; the script's take the time."""

    class CudaEvent(metaclass=_SameInstances):
        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            if not is_users(sys._getframe(1)):
                return old(*args, **kwargs)
            say("torch.cuda.Event: there is no GPU; it takes the time of this process.")
            return Event()

    CudaEvent.old = old
    return CudaEvent


def exchange(old: Any) -> Any:
    """What ``with torch.cuda.device(0):`` calls to go to a device and back (torch 2.13); there is but one place."""

    @functools.wraps(old)
    def exchange_device(device: int) -> int:
        if not is_wish_of_user(sys._getframe(1)):
            return int(old(device))
        return 0

    return exchange_device
