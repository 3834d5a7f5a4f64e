"""What becomes of a key of another tool's configuration, and a configuration of ours that is made of them.

A key is handed to an option of ours, is dropped since it says nothing here, or has no counterpart. One that no table
knows has none, and neither has one whose value the option does not take.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from halfbyte.runs.config import TrainConfig

CHECKED_LATER = {"model", "data", "eval_data", "output", "columns"}
"""Options whose values the configuration itself reads, from more than their type says."""


@dataclasses.dataclass(frozen=True)
class To:
    """Becomes ``option``, its value made by ``make``, which returns None where there is none."""

    option: str
    make: Callable[[Any], Any] | None = None


@dataclasses.dataclass(frozen=True)
class Drop:
    """Says nothing here, for this reason."""

    reason: str


@dataclasses.dataclass(frozen=True)
class Lack:
    """Has no counterpart; what to do instead."""

    instead: str


@dataclasses.dataclass
class Converted:
    """A configuration of ours under way.

    Attributes:
        tool: whose it was.
        source: the file.
        values: options.
        lacking: keys without a counterpart, with their values, and why or what to do instead.
        dropped: keys that say nothing here, and why.
        notes: what somebody should know, a sentence each.
    """

    tool: str
    source: Path
    values: dict[str, Any] = dataclasses.field(default_factory=dict)
    lacking: dict[str, tuple[Any, str]] = dataclasses.field(default_factory=dict)
    dropped: dict[str, str] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)

    def set(self, option: str, value: Any, key: str, given: Any) -> bool:
        """Set an option, or have its key among those that lack one; return whether that could be done."""
        problem = obstacle(option, value)
        if problem:
            self.lacking[key] = (given, problem)
        else:
            self.values[option] = value
        return not problem

    def config(self) -> TrainConfig:
        """Return the configuration.

        Raises:
            InputError: an option is missing or out of its bounds.
        """
        return TrainConfig.from_yaml(None, self.values)

    def to_yaml(self) -> str:
        """Return it as YAML, with what was left out as comments."""
        self.config()
        head = [f"# From {self.source.name}, a configuration of {self.tool}."]
        head += [f"# {note}" for note in self.notes]
        head += [f"# no counterpart: {line}" for line in self.lines()]
        if self.dropped:
            head.append(f"# says nothing here: {', '.join(self.dropped)}")
        ordered = {name: self.values[name] for name in TrainConfig.model_fields if name in self.values}
        text = "\n".join(line for part in head for line in part.splitlines()[:1])
        return f"{text}\n{yaml.safe_dump(ordered, sort_keys=False, allow_unicode=True)}"

    def lines(self) -> list[str]:
        """Return a line for each key that has no counterpart."""
        return [f"{key}: {_short(value)} ({why})" for key, (value, why) in self.lacking.items()]


@dataclasses.dataclass(frozen=True)
class Tool:
    """A tool whose configurations can be read.

    Attributes:
        name: of the tool.
        marks: sets of keys, each of which only its configurations have.
        defaults: values of its keys that are not in a file, where they are other than ours.
        keys: what becomes of each key.
        finish: takes the keys that belong together, among ``together``; may refuse the file.
        together: keys that ``finish`` reads.
        families: beginnings of keys that say nothing here, and why.
    """

    name: str
    marks: tuple[frozenset[str], ...]
    defaults: Mapping[str, Any]
    keys: Mapping[str, To | Drop | Lack]
    finish: Callable[[dict[str, Any], Converted], None]
    together: frozenset[str]
    families: Mapping[str, str] = dataclasses.field(default_factory=dict)


def convert_keys(tool: Tool, values: dict[str, Any], source: Path) -> Converted:
    """Take a file's keys one by one, then those that belong together.

    Raises:
        InputError: it is none of a training of adapters.
    """
    made = Converted(tool.name, source)
    for key, value in (dict(tool.defaults) | values).items():
        if key in tool.together:
            continue
        known = tool.keys.get(key)
        family = next((reason for start, reason in tool.families.items() if key.startswith(start)), None)
        if isinstance(known, To) and value is not None:
            _hand_on(known, key, value, made)
        elif value is None or value is False or value in ("", [], {}):
            continue  # not asked for
        elif isinstance(known, Drop) or family:
            made.dropped[key] = known.reason if isinstance(known, Drop) else str(family)
        else:
            instead = known.instead if isinstance(known, Lack) else "halfbyte has no option for it"
            made.lacking[key] = (value, instead)
    tool.finish(dict(tool.defaults) | values, made)
    return made


def _hand_on(to: To, key: str, value: Any, made: Converted) -> None:
    if value is False and to.option not in TrainConfig.model_fields:
        return  # not asked for
    try:
        new = to.make(value) if to.make else value
    except (ValueError, TypeError):
        made.lacking[key] = (value, "its value is not understood")
        return
    if new is not None:
        made.set(to.option, new, key, value)


def obstacle(option: str, value: Any) -> str | None:
    """Return why this halfbyte does not take ``value`` for ``option``, or None."""
    field = TrainConfig.model_fields.get(option)
    if field is None:
        return f"this halfbyte has no option {option}"
    if option in CHECKED_LATER:
        return None
    try:
        TypeAdapter[Any](field.annotation or Any).validate_python(value)
    except ValidationError as error:
        return f"{option} {error.errors()[0]['msg'].removeprefix('Input ').replace(chr(39), '')}"
    return None


def number(value: Any) -> float:
    """Return a number, also of what YAML 1.1 reads as text (``2e-4``)."""
    return float(value)


def _short(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."
