"""What a row of data can say: an example, of one of five shapes. Reading makes them, methods learn from them."""

import dataclasses
from typing import Any

from halfbyte.errors import InputError

Message = dict[str, Any]
"""One turn: ``role`` (one of ``ROLES``), ``content`` (text, or a list of parts ``{"type": "text", "text": ...}``), and
where the data has them ``reasoning_content`` (an assistant's thoughts), ``tool_calls`` (as transformers' templates take
them), ``name``, ``tool_call_id``, and ``train`` (False: this assistant turn is read, not learned)."""

ROLES = ("system", "user", "assistant", "tool")


class BadRow(InputError):
    """A row that cannot be trained on.

    Attributes:
        where: file, row and line.
        kind: what is wrong, in a few words that are the same for every row with this trouble.
    """

    def __init__(self, where: str, kind: str, sentence: str) -> None:
        """Make an error that reads ``where`` and ``sentence``, which may begin with a colon or a comma."""
        super().__init__(f"{where}{'' if sentence.startswith((':', ',')) else ' '}{sentence}")
        self.where = where
        self.kind = kind


@dataclasses.dataclass(frozen=True)
class Example:
    """What a row of data says.

    Attributes:
        where: file and row, for error messages.
        unused: columns of the row that had no part in it.
        notes: what was made of the row that its author might not expect ("a number became text"), in words that are
            the same for every such row: they are counted and told once.
    """

    where: str
    unused: tuple[str, ...] = dataclasses.field(default=(), kw_only=True, compare=False)
    notes: tuple[str, ...] = dataclasses.field(default=(), kw_only=True, compare=False)


@dataclasses.dataclass(frozen=True)
class LeftOut(Example):
    """A row in which a method has nothing to learn, though nothing is wrong with it.

    Attributes:
        why: in words that are the same for every such row; they go on from "rows".
    """

    why: str


@dataclasses.dataclass(frozen=True)
class Chat(Example):
    """A conversation; assistant turns that follow another message are answers.

    Attributes:
        messages: the turns, with at least one answer among them.
        tools: JSON schemas of the functions that may be called, for the template.
    """

    messages: list[Message]
    tools: list[dict[str, Any]] | None = dataclasses.field(default=None, kw_only=True)


@dataclasses.dataclass(frozen=True)
class Completion(Example):
    """A prompt and how it goes on."""

    prompt: str
    completion: str


@dataclasses.dataclass(frozen=True)
class Text(Example):
    """A text without a prompt."""

    text: str


@dataclasses.dataclass(frozen=True)
class Preference(Example):
    """Two ways to go on, the first preferred.

    Attributes:
        prompt: a text, or the turns before the answer.
        chosen: a text, or the turns of the answer; of the same kind as the prompt.
        rejected: likewise.
    """

    prompt: str | list[Message]
    chosen: str | list[Message]
    rejected: str | list[Message]
    tools: list[dict[str, Any]] | None = dataclasses.field(default=None, kw_only=True)


@dataclasses.dataclass(frozen=True)
class Judged(Example):
    """One way to go on, judged good or bad (unpaired preference)."""

    prompt: str | list[Message]
    completion: str | list[Message]
    good: bool
