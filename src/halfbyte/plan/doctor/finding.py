"""What the doctor says: a finding, and how a look that fails becomes one."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from halfbyte.errors import InputError

Level = Literal["ok", "note", "warning", "fault"]
"""``note``: good to know. ``warning``: costs time, memory or quality. ``fault``: does not work, or computes wrongly."""
LEVELS: tuple[Level, ...] = get_args(Level)
LONGEST = 300
"""Characters of another's error that are told."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        what: was looked at, by a name that stays the same: ``threads``, ``chat template``.
        value: what was found.
        why: it matters; empty where nothing is the matter.
        fix: what to do, as it can be pasted where it is a command.
        level: how bad it is.
    """

    what: str
    value: str
    why: str = ""
    fix: str = ""
    level: Level = "ok"


def looked(what: str, look: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """Return what a look finds; one that fails is a finding, since what is broken is what the doctor is for.

    Args:
        what: it looks at.
        look: yields findings; those from before it failed are kept.
    """
    found: list[Finding] = []
    try:
        for finding in look():
            found.append(finding)
    except InputError as error:
        found.append(Finding(what, str(error), level="fault"))
    except Exception as error:  # whatever a broken library or a damaged file makes of itself
        found.append(Finding(what, f"could not be looked at: {told(error)}", level="warning"))
    return found


def told(error: BaseException) -> str:
    """Return an error of others on one line, with its kind."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text if len(text) <= LONGEST else f'{text[:LONGEST]} ...'}".rstrip(": ")


def worst(findings: Iterable[Finding]) -> Level:
    """Return the level of the worst of ``findings``."""
    return max((finding.level for finding in findings), key=LEVELS.index, default="ok")
