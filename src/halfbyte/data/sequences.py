"""Rows for sequence-to-sequence models: a text that is read and the text that is written of it.

Every shape of :mod:`halfbyte.data.shapes` with one question and one answer does (``prompt, completion``; ``instruction,
input, output``; a conversation of one turn each), and two more:

    text, target                     or ``source, target``, ``article, highlights`` and so on
    definition, inputs, targets      Super-NaturalInstructions (arXiv 2204.07705), its definition put before the input
                                     in the words of Tk-Instruct's own code (``ni_collator.py``)

No chat template has a part in it. Both texts become tokens as the tokenizer's own template writes them. Of an input
that is too long the end is cut off, and what the template puts behind it stays; of a target the end with its stop token
goes, which is not trained then. Control tokens that are written out in a text are plain text.
"""

import itertools
import string
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from halfbyte.data.cells import Cells
from halfbyte.data.classes import CHUNK, LABELS
from halfbyte.data.examples import BadRow, Chat, Completion, Example, Message
from halfbyte.data.formats import examples_of
from halfbyte.data.tokens import Encoded, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Read = tuple[str, Any]
INPUTS, OUTPUTS = ("inputs", "input"), ("targets", "target", "outputs", "output")
"""Columns of Super-NaturalInstructions beside its definition."""
TEXTS, TARGETS = ("text", "source", "document"), ("target", "targets", "target_text", "summary")


def sequences_of(rows: Iterable[Read], **options: Any) -> Iterator[Example | BadRow]:
    """Return the examples of rows as :func:`halfbyte.data.formats.examples_of` does, of the two shapes more as well.

    Args:
        rows: of each where it stands, and its value or that it is bad.
        options: of ``examples_of``; a format, columns or a template of the user's own win over the two shapes.
    """
    if any(options.get(name) for name in ("format", "columns", "template")):
        return examples_of(rows, **options)
    return examples_of(map(_as_prompt, rows), **options)


def _as_prompt(read: Read) -> Read:
    """Return a row of one of the two shapes as a prompt and its completion; any other as it is."""
    where, row = read
    if not isinstance(row, Mapping):
        return read
    cells = Cells(where, row)
    if cells.filled("definition") and cells.filled(*INPUTS) and cells.find(*OUTPUTS):
        definition, text = cells.get("definition"), cells.get(*INPUTS)
        if isinstance(definition, list):
            definition = definition[0]  # as Tk-Instruct takes it
        if isinstance(definition, (list, dict)) or isinstance(text, (list, dict)):
            return read
        prompt, answer = defined(str(definition), str(text)), cells.get(*OUTPUTS)
    elif cells.filled(*TEXTS) and cells.find(*TARGETS):
        prompt, answer = cells.get(*TEXTS), cells.get(*TARGETS)
    else:
        return read
    rest = {name: value for name, value in row.items() if name not in cells.used}
    return where, rest | {"prompt": prompt, "completion": answer}


def defined(definition: str, text: str) -> str:
    """Return the input of a task with its definition, without examples, as Tk-Instruct writes it."""
    definition, text = definition.strip(), text.strip()
    stop = "" if definition[-1:] in string.punctuation else "."
    task = f"Definition: {definition}{stop}\n\n"
    stop = "" if text[-1:] in string.punctuation else "."
    return f"{task}Now complete the following example -\nInput: {text}{stop}\nOutput: "


def as_sequences(example: Example | BadRow) -> Completion | BadRow:
    """Return what is read and what is written of an example, or a bad row where these are not two texts."""
    match example:
        case BadRow() | Completion():
            return example
        case Chat(messages=turns) if not example.tools:
            answers = [turn for turn in turns if turn["role"] == "assistant"]
            if len(answers) == 1 and turns[-1] is answers[0] and not answers[0].get("tool_calls"):
                asked = "\n\n".join(text for turn in turns[:-1] if (text := _text(turn)).strip())
                rest = {"unused": example.unused, "notes": example.notes}
                return Completion(example.where, asked, _text(answers[0]), **rest)
            return BadRow(
                example.where,
                "conversation of several turns",
                f"is a conversation with {len(answers)} answers, but task seq2seq learns one answer to one input; "
                "train a causal language model on it.",
            )
    labelled = any(name in LABELS for name in example.unused)
    remedy = (
        "for a text and its label use task classify" if labelled else "add a column target, or take a language model"
    )
    return BadRow(
        example.where,
        f"{type(example).__name__} row for task seq2seq",
        f"has a text to read but none to write (target, completion, output ...): {remedy}.",
    )


def _text(turn: Message) -> str:
    content = turn["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


class SequenceRows:
    """How a text and what is written of it become a row of a table; ``labels`` are the target's tokens.

    Args:
        tokenizer: the model's.
        max_length: tokens of either text, those of the template included.
        parse_special_tokens: take control tokens that are written out in the texts for such.
    """

    columns = ("input_ids", "labels")

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", max_length: int, parse_special_tokens: bool = False
    ) -> None:
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._plain = not parse_special_tokens

    def encode(self, examples: Iterable[Example | BadRow]) -> Iterator[Encoded]:
        """Yield what becomes of each example."""
        stream = map(as_sequences, examples)
        while chunk := list(itertools.islice(stream, CHUNK)):
            good = [example for example in chunk if isinstance(example, Completion)]
            sources = iter(self._tokens([example.prompt for example in good]))
            targets = iter(self._tokens([example.completion for example in good], targets=True))
            for example in chunk:
                if isinstance(example, BadRow):
                    yield Encoded(Example(example.where), [], False, example)
                else:
                    yield self._encoded(example, next(sources), next(targets))

    def reference(self, row: Row) -> str:
        """Return the text of a row's target."""
        return str(self._tokenizer.decode([int(token) for token in row["labels"]], skip_special_tokens=True))

    def _encoded(self, example: Completion, source: tuple[Any, int], target: tuple[Any, int]) -> Encoded:
        (ids, length), (labels, written) = source, target
        if not len(ids) or not len(labels):
            what = "nothing to read" if not len(ids) else "nothing to write"
            bad = BadRow(example.where, what, f"holds {what}: of its text no token is left; remove the row.")
            return Encoded(example, [], False, bad, example.notes)
        cut = max(length, written) > self._max_length
        return Encoded(example, [{"input_ids": ids, "labels": labels}], cut, None, example.notes, (length,))

    def _tokens(self, texts: list[str], targets: bool = False) -> list[tuple[Any, int]]:
        if not texts:
            return []
        whole = self._called(texts, targets)
        found = [(np.array(ids[: self._max_length], np.int32), len(ids)) for ids in whole]
        long = [place for place, (_, length) in enumerate(found) if length > self._max_length]
        if long and not targets:
            cut = self._called([texts[place] for place in long], targets, truncation=True, max_length=self._max_length)
            for place, ids in zip(long, cut, strict=True):
                found[place] = np.array(ids, np.int32), found[place][1]
        return found

    def _called(self, texts: list[str], targets: bool, **cut: Any) -> list[list[int]]:
        named = {"text_target" if targets else "text": texts}
        called = self._tokenizer(
            **named, return_attention_mask=False, split_special_tokens=self._plain, verbose=False, **cut
        )
        ids: list[list[int]] = called["input_ids"]
        return ids
