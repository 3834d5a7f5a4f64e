"""Rows to questions: what of a row a model is asked, and what it should have answered, where the row says that.

Rows have the shapes of training data (:mod:`halfbyte.data.shapes`), and may lack the answer: a prompt alone, an
instruction with its input, a conversation that ends with the user. A conversation's last answer is what should come; a
text is a prompt.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from halfbyte.data import conversations
from halfbyte.data.calls import tools_of
from halfbyte.data.cells import Cells, shown
from halfbyte.data.columns import Own
from halfbyte.data.conversations import TURNS
from halfbyte.data.examples import BadRow, Chat, Completion, Example, Judged, Message, Preference, Text
from halfbyte.data.formats import example_of, examples_of
from halfbyte.data.preferences import CHOSEN
from halfbyte.data.shapes import ANSWERS, OWN, PAIRS, PROMPT_ANSWERS

LACKING = "\N{OBJECT REPLACEMENT CHARACTER} no answer \N{OBJECT REPLACEMENT CHARACTER}"
"""Stands for the answer of a row that has none, while its shape is read."""
ANSWERED = ("completion", "chosen", "rejected", "label", "output", "answer", "response")
"""What a row that asks may lack of the columns that were named."""
Way = tuple[Mapping[str, str] | None, str | None]


@dataclass(frozen=True)
class Asked:
    """What a row asks.

    Attributes:
        where: file and row.
        prompt: a text, or the turns before the answer.
        reference: the answer that should come, or None.
        tools: JSON schemas of functions that may be called.
        row: as it was read.
    """

    where: str
    prompt: str | list[Message]
    reference: str | None
    tools: list[dict[str, Any]] | None = None
    row: Mapping[str, Any] = field(default_factory=dict)

    @property
    def turns(self) -> list[Message]:
        """The prompt as turns."""
        return [{"role": "user", "content": self.prompt}] if isinstance(self.prompt, str) else self.prompt

    @property
    def whole(self) -> list[Message]:
        """The prompt as turns, and the reference behind them."""
        answer = [] if self.reference is None else [{"role": "assistant", "content": self.reference}]
        return [*self.turns, *answer]


class Named:
    """Columns of the user's own that are asked of: those of training, the answers among which a row may lack.

    Args:
        ways: in which columns are named, each as for names of ours the columns that they are, and a template.
        always: whether a row that lacks these columns is bad; else it tells its own shape.

    Raises:
        InputError: a name is not known, or a template names no column.
    """

    def __init__(self, ways: Sequence[Way], always: bool = True) -> None:
        self.ways = ways
        self._always = always
        known = OWN | dict.fromkeys(ANSWERED, True)
        self._own = [own for columns, template in ways if (own := Own(columns or {}, template, known))]

    def cells(self, where: str, row: Mapping[str, Any]) -> Cells | None:
        """Return a row by the names of ours, in the first of the ways that it has the columns of; None: in none.

        Raises:
            BadRow: it lacks a column.
        """
        for own in self._own:
            try:
                return own.cells(where, row)
            except BadRow:
                if self._always:
                    raise
        return None


def asked_of(rows: Iterable[tuple[str, Any]], own: Named | None = None) -> Iterator[Asked | BadRow]:
    """Yield what each row asks, or that it is bad.

    Args:
        rows: of each where it stands, and its value or that it is bad (:func:`halfbyte.data.readers.read_rows`).
        own: the columns that somebody named.
    """
    for where, value in rows:
        if isinstance(value, BadRow):
            yield value
            continue
        row = {"text": value} if isinstance(value, str) else value
        if not isinstance(row, Mapping):
            yield BadRow(where, "no columns", f"is not an object with named columns, but {shown(row)}; make it one.")
            continue
        try:
            yield _asked(where, row, None if own is None else own.cells(where, row))
        except BadRow as bad:
            yield bad
        except RecursionError:
            yield BadRow(where, "nested too deeply", "is nested too deeply to be read; write it flatter.")


def _asked(where: str, row: Mapping[str, Any], own: Cells | None) -> Asked:
    cells = own or Cells(where, row)
    if (name := cells.filled(*TURNS)) and not (isinstance(cells.peek(name), str) and cells.filled("summary")):
        turns = conversations.messages(cells, name, cells.get(name))
        system = conversations.system_of(cells)
        return _conversation(cells, [*(system if turns[:1] != system else []), *turns], tools_of(cells))
    lacking = _lacking(cells)
    if own:
        made = own.made if lacking is None else {**own.made, lacking: LACKING}
        return _of(cells, example_of(Cells(where, row, own.names, made)))
    completed = row if lacking is None else {**row, cells.names.columns.get(lacking, lacking): LACKING}
    [example] = examples_of([(where, completed)])
    if isinstance(example, BadRow):
        raise example
    return _of(cells, example)


def _conversation(cells: Cells, turns: list[Message], tools: list[dict[str, Any]] | None) -> Asked:
    turns = [{key: value for key, value in turn.items() if key != "train"} for turn in turns]
    reference = None
    if turns[-1]["role"] == "assistant":
        *turns, last = turns
        content = str(last["content"])
        reference = content if content != LACKING and (content.strip() or not last.get("tool_calls")) else None
    if not any(turn["role"] == "user" for turn in turns):
        raise cells.bad("no question", "asks nothing: it has no turn of the user's; add one, or remove the row.")
    return Asked(cells.where, turns, reference, tools, cells.row)


def _of(cells: Cells, example: Example) -> Asked:
    match example:
        case Chat(_, messages):
            return _conversation(cells, messages, example.tools)
        case Completion(_, prompt, completion):
            return _text(cells, prompt, None if completion == LACKING else completion)
        case Text(_, text):
            return _text(cells, text, None)
        case Preference(_, prompt, chosen):
            return _judged(cells, prompt, chosen, example.tools)
        case Judged(_, prompt, completion, good):
            return _judged(cells, prompt, completion if good else None, None)
    raise TypeError(f"{type(example).__name__} asks nothing")


def _text(cells: Cells, prompt: str, reference: str | None) -> Asked:
    if not prompt.strip():
        raise cells.bad(
            "no question", f"asks nothing: its {cells.called('prompt')} is empty; fill it in, or remove the row."
        )
    return Asked(cells.where, prompt, reference, None, cells.row)


def _judged(
    cells: Cells, prompt: str | list[Message], answer: str | list[Message] | None, tools: list[dict[str, Any]] | None
) -> Asked:
    if isinstance(prompt, str):
        return _text(cells, prompt, answer if isinstance(answer, str) else None)
    return _conversation(cells, [*prompt, *(answer if isinstance(answer, list) else [])], tools)


def _lacking(cells: Cells) -> str | None:
    """Return the name of the answer that is missing or empty where a row asks something."""
    pairs: list[tuple[tuple[str, ...], tuple[str, ...]]]
    if cells.filled("prompt"):
        pairs = [(("prompt",), (*PROMPT_ANSWERS, *CHOSEN))]
    elif cells.filled("instruction"):
        pairs = [(("instruction",), ("output", "response", *ANSWERS))]
    else:
        pairs = [(asked, answers) for asked, answers in PAIRS if cells.filled(*asked)]
    if not pairs or any(cells.filled(*answers) for _, answers in pairs):
        return None
    answers = pairs[0][1]
    return cells.find(*answers) or answers[0]
