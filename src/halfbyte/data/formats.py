"""Rows to examples: which columns a row may have, and what each of them means.

Every row tells its shape by its columns, so a file may mix them; of several shapes that fit, the first one of
``FORMATS`` counts, unless the user names one. Columns are found whatever their case, blanks and ``-``. Columns of the
user's own are given the names of ours first (``columns``), or become a text (``template``). An example says which
columns of its row were not used and what was made of the others. A new shape is one more entry of ``FORMATS``.
"""

import dataclasses
import re
import reprlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from halfbyte.data import conversations, preferences, trees
from halfbyte.data.cells import Cells
from halfbyte.data.conversations import SYSTEM, TURNS, as_turns, opening
from halfbyte.data.examples import BadRow, Chat, Completion, Example, Text
from halfbyte.errors import InputError, named, nearest

Row = tuple[str, Any]

QUESTIONS = (
    "question", "query", "problem", "instruction", "input", "inputs", "source", "user", "human", "request", "ask",
)  # fmt: skip
ANSWERS = (
    "answer", "answers", "response", "output", "outputs", "target", "targets", "solution", "assistant", "completion",
    "reply", "gpt",
)  # fmt: skip
CONTEXT = ("context", "passage", "input", "inputs")
DOCUMENTS = ("text", "content", "document", "body", "article")
OIG = {"<human>:": "user", "<bot>:": "assistant"}
GUANACO = {"### Human:": "user", "### Assistant:": "assistant"}
OWN = (
    "system", "prompt", "completion", "messages", "text", "chosen", "rejected", "label", "instruction", "input",
    "output", "context", "history", "tools",
)  # fmt: skip
"""What a column of the user's own can be named to be."""


@dataclasses.dataclass(frozen=True)
class Format:
    """A shape of rows.

    Attributes:
        about: its columns, for help and messages.
        fits: tells whether a row has it.
        read: makes an example of the row.
    """

    about: str
    fits: Callable[[Cells], bool]
    read: Callable[[Cells], Example]


def read_examples(
    rows: Iterable[Row],
    *,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    template: str | None = None,
    counts: Counter[str] | None = None,
) -> Iterator[Example | BadRow]:
    """Return the examples of rows, one for each, as they are read; of a tree of messages one for all of its rows.

    Args:
        rows: of each where it stands, and its value or that it is bad.
        format: the shape of all of them, a key of ``FORMATS``; None lets each row tell its own.
        columns: for names of ours (``OWN``) the columns that they are.
        template: a text with columns in braces, which becomes the prompt where a completion is named among ``columns``,
            else the text that is trained.
        counts: is told how many rows have which shape.

    Raises:
        InputError: there is no such format, or ``columns`` or ``template`` cannot be understood.
    """
    format = NAMES.get(format or "", format)
    if format is not None and format not in FORMATS:
        raise InputError(f"There is no format {format!r}{nearest(format, FORMATS)}; formats are {', '.join(FORMATS)}.")
    for name in columns or {}:
        if name not in OWN:
            raise InputError(f"columns names {name!r}{nearest(name, OWN)}; what a column can be is {', '.join(OWN)}.")
    pieces = None if template is None else _pieces(template)
    return _examples(rows, format, columns or {}, pieces, counts if counts is not None else Counter())


def _examples(
    rows: Iterable[Row],
    format: str | None,
    columns: Mapping[str, str],
    pieces: list[tuple[str, str]] | None,
    counts: Counter[str],
) -> Iterator[Example | BadRow]:
    for where, value in trees.gathered(rows):
        if isinstance(value, BadRow):
            yield value
            continue
        if isinstance(value, str):
            value = {"text": value}
        if not isinstance(value, Mapping):
            yield BadRow(
                where, "no columns", f"is not an object with named columns, but {reprlib.repr(value)}; make it one."
            )
            continue
        cells = Cells(where, value)
        try:
            if columns or pieces:
                cells = _renamed(cells, columns, pieces)
            name = format or _format_of(cells)
            example = FORMATS[name].read(cells)
        except BadRow as bad:
            yield bad
        else:
            counts[name] += 1
            yield dataclasses.replace(example, **cells.rest)


def _format_of(cells: Cells) -> str:
    for name, form in FORMATS.items():
        if form.fits(cells):
            return name
    columns = [str(column) for column in cells.row]
    hint = next((hint for column in columns for known in (*OWN, *QUESTIONS, *ANSWERS)
                 if (hint := nearest(column.casefold(), [known]))), "")  # fmt: skip
    raise cells.bad(
        "columns not recognised",
        f"has the columns {named(columns) or '(none)'}, which make no known shape{hint}; say which is which with "
        "columns (--columns prompt=...,completion=...), or name them like one of these: "
        + "; ".join(form.about for form in FORMATS.values())
        + ".",
    )


def _renamed(cells: Cells, columns: Mapping[str, str], pieces: list[tuple[str, str]] | None) -> Cells:
    """Return the row with the names of ours that the user has for its columns, and with the text of the template."""
    row: dict[str, Any] = {}
    used = []
    for name, column in columns.items():
        if column not in cells.row:
            raise cells.lacks(column, f"columns names as the {name}")
        row[name] = cells.row[column]
        used.append(column)
    if pieces:
        text = ""
        for words, column in pieces:
            text += words
            if column:
                if column not in cells.row:
                    raise cells.lacks(column, "the template names")
                text += cells.as_text(column, cells.row[column], "")
                used.append(column)
        row["prompt" if "completion" in columns else "text"] = text
    renamed = Cells(cells.where, row | {column: cells.row[column] for column in cells.row if column not in row})
    renamed.notes |= cells.notes
    renamed.use(*used)
    return _OnlyNamed(renamed, row) if columns else renamed


class _OnlyNamed(Cells):
    """A row of which only the columns that the user named are looked at; the others were not used."""

    def __init__(self, cells: Cells, row: Mapping[str, Any]) -> None:
        super().__init__(cells.where, row)
        self.notes = cells.notes
        self._unused = tuple(column for column in cells.row if column not in row and column not in cells._used)

    @property
    def rest(self) -> dict[str, Any]:
        return super().rest | {"unused": self._unused}


def _pieces(template: str) -> list[tuple[str, str]]:
    """Return the words of a template, each with the column that follows; ``{{`` and ``}}`` are braces."""
    found: list[tuple[str, str]] = []
    words = ""
    for token in re.findall(r"\{\{|\}\}|\{[^{}]*\}|[{}]|[^{}]+", template):
        if token in ("{{", "}}"):
            words += token[0]
        elif token in ("{", "}"):
            raise InputError(f"The template {template!r} has a brace {token!r} by itself; write it twice.")
        elif token[0] == "{":
            found.append((words, token[1:-1].strip()))
            words = ""
            if not found[-1][1]:
                raise InputError(f"The template {template!r} has braces without a column's name in them.")
        else:
            words += token
    if not found:
        raise InputError(f"The template {template!r} names no column; write one in braces, such as {{question}}.")
    return [*found, (words, "")]


def _asked(cells: Cells, question: str, answer: str) -> Chat:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Chat(cells.where, [*opening(cells), *turns])


def _chat(cells: Cells) -> Chat:
    name = cells.find(*TURNS) or TURNS[0]
    turns = conversations.messages(cells, name, cells.get(*TURNS))
    system = cells.text(*SYSTEM, missing="") if cells.find(*SYSTEM) else ""
    if system.strip() and turns[0]["role"] != "system":
        turns.insert(0, {"role": "system", "content": system})
    return Chat(cells.where, conversations.conversation(cells, turns), tools=conversations.tools_of(cells))


def _tree(cells: Cells) -> Chat:
    return Chat(cells.where, conversations.conversation(cells, trees.best_path(cells)))


def _alpaca(cells: Cells) -> Chat:
    question = cells.text("instruction", missing="")
    more = cells.text("input", "context", missing="") if cells.find("input", "context") else ""
    question = "\n\n".join(part for part in (question, more) if part.strip())
    if not question:
        raise cells.bad("instruction is empty", ": instruction and input are empty; remove the row.")
    return _asked(cells, question, cells.answer("output", "response", "completion", "answer"))


def _prompt(cells: Cells) -> Example:
    name = cells.find(*PROMPT_ANSWERS) or "completion"
    prompt, answer = cells.parsed_turns("prompt"), cells.parsed_turns(name)
    if isinstance(prompt, list) or isinstance(answer, list):
        turns = [*as_turns(cells, "prompt", prompt, "user"), *as_turns(cells, name, answer, "assistant")]
        return Chat(cells.where, conversations.conversation(cells, turns), tools=conversations.tools_of(cells))
    prompt, answer = cells.text("prompt", missing=""), cells.answer(name)
    earlier = opening(cells)
    return _asked(cells, prompt, answer) if earlier else Completion(cells.where, prompt, answer)


PROMPT_ANSWERS = ("completion", "response", "answer", "output")


def _question(cells: Cells) -> Chat:
    asked = cells.find(*QUESTIONS)
    others = [name for name in CONTEXT if name != asked and cells.find(name)]
    question = cells.text(*QUESTIONS)
    parts = [*(cells.text(name, missing="") for name in others), question]
    return _asked(cells, "\n\n".join(part for part in parts if part.strip()), cells.answer(*ANSWERS))


def _spoken(cells: Cells) -> Chat:
    text = cells.text("text")
    turns = next(turns for marks in (OIG, GUANACO) if (turns := conversations.transcript(text, marks)))
    return Chat(cells.where, conversations.conversation(cells, turns))


def _text(cells: Cells) -> Text:
    name = cells.find(*DOCUMENTS) or "text"
    text = cells.text(name)
    if not text.strip():
        raise cells.bad("text is empty", f": {name} is empty: there is nothing to train on; remove the row.")
    return Text(cells.where, text)


def _has(*alternatives: tuple[str, ...]) -> Callable[[Cells], bool]:
    return lambda cells: all(cells.find(*names) for names in alternatives)


def _is_spoken(cells: Cells) -> bool:
    text = cells.row.get("text")
    return isinstance(text, str) and text.lstrip().startswith((*OIG, *GUANACO))


def _is_text(cells: Cells) -> bool:
    """Tell whether a row is a text; a message a row, without its conversation, is none."""
    return bool(cells.find("text") or (cells.find(*DOCUMENTS) and not cells.find("role", "from")))


def _is_question(cells: Cells) -> bool:
    asked, answered = cells.find(*QUESTIONS), cells.find(*ANSWERS)
    return asked is not None and answered is not None


FORMATS: dict[str, Format] = {
    "preference": Format("prompt, chosen and rejected", _has(("chosen",), ("rejected",)), preferences.preference),
    "unpaired": Format("prompt, completion and label (true or false)", preferences.is_judged, preferences.judged),
    "messages": Format("messages (role, content) or conversations (from, value)", _has(TURNS), _chat),
    "oasst": Format("trees of messages (prompt, replies)", trees.is_tree, _tree),
    "alpaca": Format(
        "instruction, input and output",
        _has(("instruction",), ("output", "response", "completion", "answer")),
        _alpaca,
    ),
    "completion": Format("prompt and completion", _has(("prompt",), PROMPT_ANSWERS), _prompt),
    "question": Format("question and answer", _is_question, _question),
    "transcript": Format("text of turns behind <human>: and <bot>:", _is_spoken, _spoken),
    "text": Format("text", _is_text, _text),
}
"""Shapes by name; the first that fits a row counts."""
NAMES = {"sharegpt": "messages", "chat": "messages", "hh-rlhf": "preference", "prompt": "completion"}
"""Other names of theirs."""
