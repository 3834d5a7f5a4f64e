"""Rows that cannot be trained on: counted by kind, told, or left out and written down.

A run stops at them unless it was told to skip them; it goes through all of the data first, so that it can say how many
there are of each kind. Over a tenth of the rows is rarely what somebody meant who wanted to skip a few, so that is an
error too, unless all may be skipped.
"""

import dataclasses
import json
from pathlib import Path
from typing import Literal, TextIO

from halfbyte.data.examples import BadRow
from halfbyte.errors import InputError, counted

Skip = bool | Literal["all"]
"""Whether bad rows are left out: not at all, up to ``SHARE`` of the rows, or however many there are."""

SHARE = 0.1
KINDS_TOLD = 3


@dataclasses.dataclass
class BadRows:
    """What was bad among the rows.

    Attributes:
        counts: rows of each kind.
        first: the sentence about the first row of each kind.
    """

    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    first: dict[str, str] = dataclasses.field(default_factory=dict)

    def add(self, row: BadRow) -> None:
        """Count ``row``."""
        self.counts[row.kind] = self.counts.get(row.kind, 0) + 1
        self.first.setdefault(row.kind, str(row))

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.counts.values())

    def check(self, rows: int, skip: Skip, verb: str = "train on", done: str = "trained on") -> None:
        """Go on with the others of ``rows`` rows, if ``skip`` says so and there are any.

        Args:
            rows: how many there are.
            skip: whether to.
            verb: what is done with rows, for messages; and ``done``, its participle.

        Raises:
            InputError: it does not, or too many are bad.
        """
        if not self.total:
            return
        if self.total == rows:
            remedy = f"none is left to {verb}"
        elif not skip:
            them = "it" if self.total == 1 else "them"
            remedy = f"mend {them}, or {verb} the others with skip_bad_rows (--skip-bad-rows)"
        elif skip != "all" and self.total > SHARE * rows:
            remedy = (
                f"that is more than {SHARE:.0%}, so perhaps not what was meant; to {verb} the others all the same, "
                "set skip_bad_rows to all (--skip-bad-rows all)"
            )
        else:
            return
        if rows == self.total == 1:
            raise InputError(next(iter(self.first.values())))
        raise InputError(f"{self.total:,} of {rows:,} rows cannot be {done}; {remedy}.\n{self.told()}")

    def told(self) -> str:
        """The commonest kinds, a line each: how many, and the first of them."""
        kinds = sorted(self.counts, key=lambda kind: -self.counts[kind])
        lines = [f"  {kind} ({self.counts[kind]:,}): {self.first[kind]}" for kind in kinds[:KINDS_TOLD]]
        if more := kinds[KINDS_TOLD:]:
            rows = counted(sum(self.counts[kind] for kind in more), "row")
            lines.append(f"  and {counted(len(more), 'more kind')} ({rows})")
        return "\n".join(lines)


class SkippedFile:
    """``skipped.jsonl``: a line for each bad row, with its place, kind and reason."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: TextIO | None = None

    def add(self, row: BadRow) -> None:
        """Write ``row`` down; the file is made with the first."""
        self._file = self._file or self._path.open("w", encoding="utf-8", errors="backslashreplace")
        line = {"where": row.where, "kind": row.kind, "reason": str(row)}
        self._file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def close(self) -> None:
        """Finish the file, if there is one."""
        if self._file:
            self._file.close()
