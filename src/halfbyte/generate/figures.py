"""What an engine has done and does now, as numbers: for a server's metrics and a user's curiosity."""

from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field

from halfbyte.generate.answers import Finish

BOUNDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
"""Seconds: upper bounds of the classes that steps are counted in."""


@dataclass(frozen=True)
class Figures:
    """What an engine has done, and does now.

    Attributes:
        ended: requests by the reason of their end.
        refused: requests that found the queue full.
        tokens_read: tokens of prompts that were read.
        tokens_cached: tokens of prompts that had been read before.
        tokens_written: tokens of answers.
        waiting: requests that wait for memory or a row.
        rows: requests admitted, those whose prompt is being read included.
        bytes_held: that keys and values take, kept prefixes included.
        bytes_reserved: that the requests admitted may come to take.
        steps: of decoding.
        step_seconds: they took together.
        step_counts: steps of at most ``BOUNDS`` seconds each, not cumulated; the last number: of more.
        read_seconds: that reading prompts took.
    """

    ended: dict[Finish, int]
    refused: int
    tokens_read: int
    tokens_cached: int
    tokens_written: int
    waiting: int
    rows: int
    bytes_held: int
    bytes_reserved: int
    steps: int
    step_seconds: float
    step_counts: tuple[int, ...]
    read_seconds: float


@dataclass
class Counts:
    """What is counted while an engine goes on; whoever changes or reads it holds the engine's lock."""

    ended: Counter[Finish] = field(default_factory=Counter)
    refused: int = 0
    tokens_read: int = 0
    tokens_cached: int = 0
    tokens_written: int = 0
    steps: int = 0
    step_seconds: float = 0.0
    step_counts: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS) + 1))
    read_seconds: float = 0.0

    def step(self, seconds: float) -> None:
        """Count a step of decoding."""
        self.steps += 1
        self.step_seconds += seconds
        self.step_counts[bisect_left(BOUNDS, seconds)] += 1

    def figures(self, *, waiting: int, rows: int, bytes_held: int, bytes_reserved: int) -> Figures:
        """Return all numbers as they are now."""
        counted = vars(self) | {"ended": dict(self.ended), "step_counts": tuple(self.step_counts)}
        return Figures(**counted, waiting=waiting, rows=rows, bytes_held=bytes_held, bytes_reserved=bytes_reserved)
