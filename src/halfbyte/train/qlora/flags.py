"""What a flag of ``qlora.py`` is, and a command line read as the script read it. Imports no torch.

The script's parser is transformers' ``HfArgumentParser`` (4.31) over argparse: ``--flag`` and ``--flag True`` are the
same for booleans, ``--no_flag`` is there where the default is true, the beginning of a flag's name will do where no
other begins so (``--use_auth``), and ``--flag=value`` is ``--flag value``. What it did not know it dropped in silence;
here that is an error.
"""

import argparse
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

from halfbyte.errors import InputError, nearest

TRUE, FALSE = ("yes", "true", "t", "y", "1"), ("no", "false", "f", "n", "0")


@dataclasses.dataclass(frozen=True)
class To:
    """Handed on to the argument ``name`` of transformers' trainer, or of its generation."""

    name: str


@dataclasses.dataclass(frozen=True)
class Own:
    """Obeyed by this package, which ``about`` tells."""

    about: str


@dataclasses.dataclass(frozen=True)
class Only:
    """Refused with ``reason``, but for ``values``, which say what happens anyway."""

    values: tuple[Any, ...]
    reason: str


@dataclasses.dataclass(frozen=True)
class Flag:
    """One flag.

    Attributes:
        name: without its dashes.
        kind: ``bool``, ``int``, ``float`` or ``str``.
        default: the script's.
        fate: what becomes of it.
        bare: of a boolean: whether it may stand without a value.
    """

    name: str
    kind: type
    default: Any
    fate: To | Own | Only
    bare: bool = True

    @property
    def told(self) -> str:
        """What becomes of it, for the help."""
        match self.fate:
            case To(name):
                return "as it says" if name == self.name else f"as it says ({name} of today's transformers)"
            case Own(about):
                return about
            case Only(values, reason):
                only = " or ".join(repr(value) for value in values if value is not None)
                return f"refused{f', but for {only}' if only else ''}: {reason}"


class Flags(Mapping[str, Any]):
    """The values of all flags; ``given`` are those that stood on the command line."""

    def __init__(self, known: Iterable[Flag], given: Mapping[str, Any]) -> None:
        self.known = {flag.name: flag for flag in known}
        self.given = dict(given)
        self._values = {flag.name: flag.default for flag in self.known.values()} | self.given

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __iter__(self) -> Any:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def but(self, **values: Any) -> "Flags":
        """Return the same flags with other values for some, which count as not given."""
        changed = Flags(self.known.values(), self.given)
        changed._values = self._values | values
        return changed


def parse(known: Sequence[Flag], words: Sequence[str]) -> Flags:
    """Read a command line.

    Args:
        known: all flags.
        words: the command line, without the program's name.

    Raises:
        InputError: a flag is unknown, refused, or has a wrong value.
    """
    parser = _Parser(known)
    found, rest = parser.parse_known_args(list(words))
    if rest:
        raise InputError(_unknown(rest[0], known))
    flags = Flags(known, vars(found))
    for name, value in flags.given.items():
        fate = flags.known[name].fate
        if isinstance(fate, Only) and value not in fate.values:
            shown = f"--{name}" if value is True else f"--{name} {value}"
            raise InputError(f"{shown} is refused: {fate.reason}.")
    return flags


def _unknown(word: str, known: Sequence[Flag]) -> str:
    name = word.partition("=")[0].lstrip("-–—")  # a dash that a text processor made of two
    hint = nearest(f"--{name}", [f"--{flag.name}" for flag in known])
    if not word.startswith(("-", "–", "—")):
        return f"qlora takes no word {word!r} outside of a flag{hint}."
    return f"qlora has no flag {word.partition('=')[0]}{hint}."


class _Parser(argparse.ArgumentParser):
    def __init__(self, known: Sequence[Flag]) -> None:
        super().__init__("qlora", add_help=False, argument_default=argparse.SUPPRESS)
        for flag in known:
            name = f"--{flag.name}"
            if flag.kind is not bool:
                self.add_argument(name, type=flag.kind)
            elif flag.bare:
                self.add_argument(name, type=_truth, nargs="?", const=True)
            else:
                self.add_argument(name, type=_truth)
            if flag.kind is bool and flag.default is True:
                self.add_argument(f"--no_{flag.name}", action="store_false", dest=flag.name)

    def error(self, message: str) -> NoReturn:
        text = message.removeprefix("argument ").replace("invalid _truth value", "neither true nor false")
        raise InputError(f"qlora: {text}.")


def _truth(word: str) -> bool:
    if word.lower() in TRUE + FALSE:
        return word.lower() in TRUE
    raise ValueError
