"""The shapes that rows of data sets have, a table: which columns each needs, and what they mean.

Of several shapes that fit a row the first one of ``FORMATS`` counts. A new shape is one more entry.
"""

import dataclasses
from collections.abc import Callable
from functools import lru_cache

from halfbyte.data import conversations, preferences, trees
from halfbyte.data.calls import calls_in, tools_of
from halfbyte.data.cells import Cells, Names, plain, words
from halfbyte.data.conversations import TURNS, as_turns, opening
from halfbyte.data.examples import Chat, Completion, Example, Message, Text
from halfbyte.errors import named

ANSWERS = (
    "answer", "answers", "response", "output", "outputs", "completion", "solution", "target", "targets", "reply",
)  # fmt: skip
PAIRS = (
    (("source",), ("target", "targets")),
    (("human",), ("assistant", "gpt", "bot", "answer")),
    (("user",), ("assistant", "bot", "gpt")),
    (("problem",), ("solution", *ANSWERS)),
    (("query",), ("response", *ANSWERS)),
    (("question", "instruction", "request"), ANSWERS),
    (("inputs", "input"), ("targets", "target", "output", "outputs", *ANSWERS)),
    (("article", "document", "dialogue", "dialog"), ("highlights", "summary")),
    (("q",), ("a",)),
)
"""Columns of a question, and of its answer by their likeliness; of a row's pairs the first full one counts."""
PASSAGES = ("context", "passage")
"""Columns that a question is about."""
MORE = ("input", *PASSAGES, "question", "query", "problem")
"""Columns that an instruction is about."""
PROMPT_ANSWERS = ("completion", "response", "answer", "output", "answers", "target", "solution", "reply")
DOCUMENTS = ("text", "content", "document", "body", "article")
ABOUT_TEXT = {
    "id", "uuid", "guid", "doc_id", "index", "idx", "url", "link", "title", "headline", "author", "authors", "date",
    "timestamp", "created", "published", "lang", "language", "source", "domain", "file", "filename", "file_name",
    "path", "meta", "metadata", "license", "licence", "category", "topic", "tags", "label", "subset", "split", "score",
    "length",
}  # fmt: skip
"""Columns that only say something about a text; beside others, a column such as ``content`` may not be all of it."""
OIG = {"\n<human>:": "user", "\n<bot>:": "assistant"}
GUANACO = {"### Human:": "user", "### Assistant:": "assistant"}

COMBINED = "the question was put together from the columns {}"


@dataclasses.dataclass(frozen=True)
class Format:
    """A shape of rows.

    Attributes:
        about: its columns, for help and messages.
        needs: groups of columns; a row needs one of each.
        read: makes an example of the row.
        also: what else a row must have to be of this shape.
    """

    about: str
    needs: tuple[tuple[str, ...], ...]
    read: Callable[[Cells], Example]
    also: Callable[[Cells], bool] | None = None

    def fits(self, cells: Cells) -> bool:
        """Tell whether a row has the columns of this shape."""
        return all(cells.find(*names) for names in self.needs) and (self.also is None or self.also(cells))

    def may_fit(self, names: Names) -> bool:
        """Tell whether rows with such columns can have this shape."""
        return all(map(names.present, self.needs)) and (bool(self.needs) or bool(_pairs(names)))

    def leads(self, cells: Cells) -> bool:
        """Tell whether the first of these columns holds anything: many shapes may have columns in one table."""
        return cells.filled(*self.needs[0]) is not None if self.needs else _pair_leads(cells)


def _turns(cells: Cells) -> Chat:
    turns = conversations.messages(cells, cells.find(*TURNS) or TURNS[0], cells.get(*TURNS))
    system = conversations.system_of(cells)
    if system and turns[0] != system[0]:
        turns = system + turns
    return Chat(cells.where, conversations.conversation(cells, turns), tools=tools_of(cells))


def _tree(cells: Cells) -> Chat:
    return Chat(cells.where, conversations.conversation(cells, trees.best_path(cells)))


def _prompt(cells: Cells) -> Example:
    name = cells.find(*PROMPT_ANSWERS) or PROMPT_ANSWERS[0]
    prompt, answer = cells.parsed_turns("prompt"), cells.parsed_turns(name)
    if isinstance(prompt, list) or isinstance(answer, list):
        if isinstance(answer, list) and not conversations.is_turns(answer):
            answer = cells.answer(name)
        turns = [*opening(cells), *as_turns(cells, "prompt", prompt, "user")]
        turns += as_turns(cells, name, answer, "assistant")
        return Chat(cells.where, conversations.conversation(cells, turns), tools=tools_of(cells))
    text, answer = cells.text("prompt", missing=""), cells.answer(name)
    chat = _asked(cells, text, answer)
    return chat if len(chat.messages) > 2 or chat.tools else Completion(cells.where, text, answer)


def _instruction(cells: Cells) -> Chat:
    others = [name for name in MORE if cells.filled(name)]
    if len(others) > 1 or (others and others[0] not in ("input", *PASSAGES)):
        cells.note(COMBINED.format(named(["instruction", *others])))
    return _asked(cells, _joined(cells, ["instruction", *others]), _answer(cells, ("output", "response", *ANSWERS)))


def _question(cells: Cells) -> Chat:
    asked, answers = _pair(cells) or ("question", ANSWERS)
    others = [name for name in (*PASSAGES, "input") if name != asked and cells.filled(name)]
    if others:
        cells.note(COMBINED.format(named([*others, asked])))
    return _asked(cells, _joined(cells, [*others, asked]), _answer(cells, answers))


def _pair(cells: Cells) -> tuple[str, tuple[str, ...]] | None:
    """Return the column of a row's question, and those that may hold the answer."""
    best, found = -1, None
    pairs = _pairs(cells.names)
    for questions, answers in pairs:
        asked = cells.find(*questions)
        if asked is not None and len(pairs) == 1:
            return asked, answers
        filled = 2 * (cells.filled(*questions) is not None) + (cells.filled(*answers) is not None)
        if asked is not None and filled > best:
            best, found = filled, (asked, answers)
    return found


@lru_cache(maxsize=4096)
def _pairs(names: Names) -> tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]:
    return tuple(pair for pair in PAIRS if all(map(names.present, pair)))


def _pair_leads(cells: Cells) -> bool:
    found = _pair(cells)
    return found is not None and cells.filled(found[0]) is not None


def _joined(cells: Cells, names: list[str]) -> str:
    """Return the texts of columns as one question."""
    texts = [cells.text(name, missing="") for name in names]
    question = "\n\n".join(text for text in texts if text.strip())
    if not question:
        raise cells.bad(
            "question is empty",
            f": {named(map(cells.called, names))} {'are' if names[1:] else 'is'} empty; remove the row.",
        )
    return question


def _answer(cells: Cells, names: tuple[str, ...]) -> str:
    name = cells.find(*names) or names[0]
    answer = cells.answer(name)
    there = cells.names.present(names)
    if len(there) > 1 and (
        others := [other for other in dict.fromkeys(there) if other != name and cells.filled(other)]
    ):
        cells.note(f"the answer was taken from the column {name}, not from {named(others)}")
    return answer


def _asked(cells: Cells, question: str, answer: str) -> Chat:
    tools = tools_of(cells)
    said: Message = {"role": "assistant", "content": answer}
    if tools and (calls := calls_in(cells, answer)):
        said = {"role": "assistant", "content": "", "tool_calls": calls}
    return Chat(cells.where, [*opening(cells), {"role": "user", "content": question}, said], tools=tools)


def _spoken(cells: Cells) -> Chat:
    text = cells.text("text")
    turns = next((turns for marks in (OIG, GUANACO) if (turns := conversations.transcript(text, marks))), None)
    if turns is None:
        raise cells.bad("no transcript", f": text does not begin with {' or '.join((*OIG, *GUANACO))!r}.")
    cells.note(conversations.TRANSCRIPT)
    if turns[-1] == {"role": "user", "content": ""}:  # a mark that some data sets put behind the last answer
        turns.pop()
    return Chat(cells.where, conversations.conversation(cells, conversations.system_of(cells) + turns))


def _text(cells: Cells) -> Text:
    name = cells.find(*DOCUMENTS) or "text"
    text = cells.text(name)
    if not text.strip():
        raise cells.bad(
            "text is empty", f": {cells.called(name)} is empty: there is nothing to train on; remove the row."
        )
    return Text(cells.where, text)


def _is_conversation(cells: Cells) -> bool:
    """Tell whether a column of that name is more than the text of a dialogue that is summed up."""
    return not (isinstance(cells.peek(cells.find(*TURNS) or ""), str) and cells.filled("summary"))


def _is_spoken(cells: Cells) -> bool:
    text = cells.peek("text")
    return isinstance(text, str) and text.lstrip()[:12].startswith(_BEGINNINGS)


_BEGINNINGS = tuple(mark.strip() for mark in (*OIG, *GUANACO))


def is_message(cells: Cells) -> bool:
    """Tell whether a row is one message of a conversation: it says who spoke."""
    return any(plain(words(cells.peek(name))) in conversations.ROLES for name in ("role", "from"))


def _is_text(cells: Cells) -> bool:
    """Tell whether a row is a text; a message a row, without its conversation, is none."""
    if is_message(cells):
        return False
    full = [name for name in DOCUMENTS if cells.filled(name)]
    if "text" in full or (not full and cells.find("text")):
        return True
    return len(full) == 1 and cells.filled_names <= {*full, *ABOUT_TEXT}


FORMATS: dict[str, Format] = {
    "preference": Format(
        "prompt, chosen and rejected", (preferences.CHOSEN, preferences.REJECTED), preferences.preference
    ),
    "unpaired": Format(
        "prompt, completion and label (true or false)", (preferences.LABELS,), preferences.judged, preferences.is_judged
    ),
    "messages": Format("messages (role, content) or conversations (from, value)", (TURNS,), _turns, _is_conversation),
    "oasst": Format("trees of messages (prompt, replies)", (("prompt",),), _tree, trees.is_tree),
    "alpaca": Format(
        "instruction, input and output", (("instruction",), ("output", "response", *ANSWERS)), _instruction
    ),
    "completion": Format("prompt and completion", (("prompt",), PROMPT_ANSWERS), _prompt),
    "question": Format("question and answer", (), _question, lambda cells: _pair(cells) is not None),
    "transcript": Format(
        "text of turns behind <human>: and <bot>:, or ### Human: and ### Assistant:", (("text",),), _spoken, _is_spoken
    ),
    "text": Format("text", (DOCUMENTS,), _text, _is_text),
}
"""Shapes by name; the first that fits a row counts."""
NAMES = {
    "sharegpt": "messages", "chat": "messages", "conversations": "messages", "hh-rlhf": "preference",
    "dpo": "preference", "kto": "unpaired", "prompt": "completion", "qa": "question", "chip2": "transcript",
    "guanaco": "transcript",
}  # fmt: skip
"""Other names of theirs."""
OWN: dict[str, bool] = dict.fromkeys(
    (
        "prompt", "completion", "messages", "text", "chosen", "rejected", "label", "instruction", "output", "question",
        "answer", "response",
    ),
    False,
) | dict.fromkeys(("input", "context", "system", "history", "tools"), True)  # fmt: skip
"""What a column of the user's own can be named to be, and whether a row may lack it."""
