"""The whole way of the data: from what a user names to tables of tokens to train on and to evaluate on.

A table is made once and kept (:mod:`halfbyte.data.cache`). Rows that are held out for evaluation are chosen by a hash
of their tokens, so that equal rows are on one side, and the choice does not depend on the order of the data.
"""

import contextlib
import dataclasses
import hashlib
import json
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte.choices import Task
from halfbyte.data import cache, replay
from halfbyte.data.bad_rows import BadRows, SkippedFile
from halfbyte.data.classes import Classes, Labelled, LabelledRows, labelled_of
from halfbyte.data.examples import BadRow, Example, LeftOut
from halfbyte.data.formats import examples_of
from halfbyte.data.forms import Form
from halfbyte.data.options import DataOptions
from halfbyte.data.readers import Progress
from halfbyte.data.sequences import SequenceRows, sequences_of
from halfbyte.data.sources import Source, fingerprint, read_source, resolve
from halfbyte.data.stops import choose_pad
from halfbyte.data.table import ABOUT, Counts, Table, Tokenized, last_answer, open_table
from halfbyte.data.template import chat_template
from halfbyte.data.tokens import encode_examples
from halfbyte.errors import InputError, counted, named

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

APART = {"method", "model", "data", "eval_data", "seed", "skip_bad_rows", "trust_remote_code"}
DEPENDS = {*DataOptions.model_fields} - APART
"""Options that a table depends on, beside the data and the tokenizer."""
TRAIN, EVALUATION, SKIPPED = "train", "evaluation", "skipped.jsonl"

Take = Callable[[Example | BadRow], Example | BadRow]
"""What a method makes of an example: the same, another, or a bad row."""


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What a run trains on.

    Attributes:
        train: its rows.
        evaluation: rows for evaluation, with the column ``reference``, if any were asked for.
        bad: rows that were left out.
        skipped: the file that lists them, if there are any.
        shapes: how many rows had which shape.
        said: what was found out about files, a sentence each.
        task: what the model learns from them.
        classes: of classification: the examples of each class, in the order of their numbers.
    """

    train: Tokenized
    evaluation: Tokenized | None
    bad: BadRows
    skipped: Path | None
    shapes: dict[str, int]
    said: list[str]
    task: Task = "lm"
    classes: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def longest(self) -> int:
        """Tokens of the longest row of all."""
        return max(rows.counts.longest for rows in (self.train, self.evaluation) if rows)

    @property
    def largest_id(self) -> int:
        """The greatest token id of all."""
        return max(rows.counts.largest_id for rows in (self.train, self.evaluation) if rows)

    def told(self) -> list[str]:
        """What somebody should know of it before it is trained on, a sentence each."""
        lines = [*self.said, _counted(self.train.counts, "examples", "trained", self.task)]
        if self.evaluation:
            lines.append(_counted(self.evaluation.counts, "examples for evaluation", "evaluated", self.task))
        if self.classes:
            lines.append("Classes: " + ", ".join(f"{name} {count:,}" for name, count in self.classes.items()))
        if len(self.shapes) > 1:
            lines.append("Shapes of the rows: " + ", ".join(f"{shape} {n:,}" for shape, n in self.shapes.items()))
        for note, count in self.train.counts.notes.items():
            lines.append(f"In {count:,} of the examples: {note}")
        if self.train.counts.unused:
            lines.append(f"Columns not used: {named(self.train.counts.unused)}")
        if self.bad.total:
            lines.append(f"Left out, {counted(self.bad.total, 'row')}:\n{self.bad.told()}")
        return lines


def equip(tokenizer: "PreTrainedTokenizerBase", options: DataOptions) -> list[str]:
    """Give a tokenizer the chat template and the pad token that the run uses, and return sentences that say so.

    What is trained with is saved with the adapter, so that it is used with it.
    """
    if options.chat_template or options.thinking:
        tokenizer.chat_template = chat_template(tokenizer, options.chat_template, options.thinking)
    said = choose_pad(tokenizer)
    return [] if said is None else [said]


def give_plain(tokenizer: "PreTrainedTokenizerBase", rows: Prepared) -> list[str]:
    """Give a tokenizer without a chat template the plain one that conversations were written with, if there were any.

    Returns:
        Sentences that say so.
    """
    if tokenizer.chat_template or not rows.train.counts.chats:
        return []
    tokenizer.chat_template = chat_template(tokenizer)
    return ["The model has no chat template; a plain one is taken and saved with the adapter"]


def read_examples(data: Any, progress: Progress | None = None, **options: Any) -> Iterator[Example | BadRow]:
    """Yield the examples of what a user names, in a script.

    Args:
        data: a file, a folder, a hub id ..., or several: see :class:`halfbyte.data.Source`.
        progress: as in :func:`prepare`.
        options: ``format``, ``columns``, ``template`` of all of them.

    Raises:
        InputError: a source is not there (at once), or cannot be read (when it comes to that).
    """
    sources = resolve(data)
    return (row for source in sources for row in examples_of(read_source(source, progress), **options))


def _counted(counts: Counts, what: str, labelled: str, task: str) -> str:
    cut = f", {counts.truncated:,} of them cut" if counts.truncated else ""
    tokens = f"{counts.examples:,} {what}{cut}: {counts.tokens:,} tokens"
    match task:
        case "classify":
            return tokens
        case "seq2seq":
            return f"{tokens} to read, {counts.trained_tokens:,} to write"
    return f"{tokens}, {counts.trained_tokens:,} of them {labelled}"


def prepare(
    options: DataOptions,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    method: str = "sft",
    form: Form = "answers",
    take: Take | None = None,
    progress: Progress | None = None,
    known_classes: Sequence[str] | None = None,
) -> Prepared:
    """Read, check and tokenize what ``options`` name, or take it from the cache.

    Args:
        options: of the data.
        tokenizer: the model's.
        method: decides with ``take`` what an example is.
        form: of the method's rows: see :mod:`halfbyte.data.forms`.
        take: what a training method makes of an example.
        progress: called now and then with the rows read, the bytes read, and the bytes of the source.
        known_classes: the names of the classes that the model knows, whose order wins if the data has just these.

    Raises:
        InputError: a source cannot be read, or rows cannot be trained on and may not be skipped.
    """
    contents, before = _fingerprints(options), _fingerprints(options, contents=False)
    about = options.model_dump(mode="json", include=DEPENDS)
    known = [known_classes] if options.task == "classify" and known_classes else []
    drawn = (
        options.replay
        or options.eval_share
        or any(source.weight != 1 for source in (*options.data, *(options.eval_data or ())))
    )
    name = cache.key(options.seed if drawn else None, contents, about, cache.tokenizer_key(tokenizer), method, *known)

    def make(folder: Path) -> None:
        maker = _Maker(options, tokenizer, form, take, progress, folder, known_classes)
        try:
            maker.make(int((options.eval_share or 0) * 2**64))
        except _NoneDrawnError:  # of few rows chance may hold out none: then the one that comes next
            _empty(folder)
            again = _Maker(options, tokenizer, form, take, progress, folder, known_classes)
            again.make(maker.least + 1)
        if _fingerprints(options, contents=False) != before:
            raise InputError("The data changed while it was read; start again when it is whole.")

    folder, is_temporary = cache.kept(name, make)
    temporary = folder if is_temporary else None
    about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    bad = BadRows(**about["bad"])
    bad.check(bad.total + about["examples"], options.skip_bad_rows)
    skipped = folder / SKIPPED
    evaluation = open_table(folder / EVALUATION, temporary=temporary) if (folder / EVALUATION).is_dir() else None
    return Prepared(
        train=open_table(folder / TRAIN, temporary=temporary),
        evaluation=evaluation,
        bad=bad,
        skipped=skipped if skipped.is_file() else None,
        shapes=about["shapes"],
        said=about["said"],
        task=options.task,
        classes=about["classes"],
    )


def _fingerprints(options: DataOptions, *, contents: bool = True) -> list[list[str]]:
    both = (options.data, options.eval_data, [replay.parse(options.replay).source] if options.replay else [])
    return [[fingerprint(source, contents=contents) for source in sources or ()] for sources in both]


def _empty(folder: Path) -> None:
    for table in (TRAIN, EVALUATION):
        shutil.rmtree(folder / table)
    (folder / SKIPPED).unlink(missing_ok=True)


class _NoneDrawnError(Exception):
    """Of several rows none was held out."""


class _Maker:
    """Makes the tables of training and evaluation in one folder.

    Attributes:
        least: of the numbers that rows drew.
    """

    def __init__(
        self,
        options: DataOptions,
        tokenizer: "PreTrainedTokenizerBase",
        form: Form,
        take: Take | None,
        progress: Progress | None,
        folder: Path,
        known_classes: Sequence[str] | None = None,
    ) -> None:
        self.options = options
        self.tokenizer = tokenizer
        self.form: Form = form
        self.take = take
        self.progress = progress
        self.folder = folder
        self.bad = BadRows()
        self.left_out: Counter[str] = Counter()
        self.shapes: Counter[str] = Counter()
        self.said: list[str] = []
        self.known_classes = known_classes
        self.classes = Classes()
        kinds: dict[str, type[LabelledRows] | type[SequenceRows]] = {"classify": LabelledRows, "seq2seq": SequenceRows}
        kind = kinds.get(options.task)
        self.pairs = kind(tokenizer, options.max_length, options.parse_special_tokens) if kind else None
        self.least = 2**64

    def make(self, held_out: int) -> None:
        """Fill the folder.

        Args:
            held_out: rows that draw a number below it are for evaluation.
        """
        options = self.options
        names = self._name_classes() if isinstance(self.pairs, LabelledRows) else []
        with contextlib.ExitStack() as stack:
            skipped = stack.enter_context(contextlib.closing(SkippedFile(self.folder / SKIPPED)))
            train = stack.enter_context(self._table(TRAIN))
            evaluated = options.eval_data or options.eval_share
            evaluation = stack.enter_context(self._table(EVALUATION)) if evaluated else train
            for sources, table in ((options.data, train), (options.eval_data or [], evaluation)):
                for encoded in self._encoded(sources):
                    if encoded.bad:
                        self.bad.add(encoded.bad)
                        skipped.add(encoded.bad)
                        continue
                    draw = self._draw(encoded.rows) if held_out else 0
                    self.least = min(self.least, draw)
                    (evaluation if draw < held_out else table).add(encoded)
            if options.replay:
                self._replay(replay.parse(options.replay), train, skipped)
        if held_out and not evaluation.counts.examples and train.counts.examples > 1:
            raise _NoneDrawnError
        examples = train.counts.examples + (evaluation.counts.examples if evaluation is not train else 0)
        for table, what in ((train, "train"), (evaluation, "evaluate")):
            if not table.counts.examples and (examples or self.left_out):
                if not examples and (why := self._why_nothing()):
                    raise InputError(f"There is nothing to {what} on:\n{why}")
                raise InputError(f"There is nothing to {what} on; name more data, or another eval_share.")
        about = {
            "examples": examples,
            "bad": dataclasses.asdict(self.bad),
            "shapes": self.shapes,
            "said": [*self.said, *self._left_out_told()],
            "classes": {name: self.classes.by_name[name] for name in names},
        }
        (self.folder / ABOUT).write_text(json.dumps(about), encoding="utf-8")

    def _replay(self, wanted: replay.Replay, train: Table, skipped: SkippedFile) -> None:
        """Add the rows that are mixed in, and say how many they are."""
        before, said = train.counts.examples, len(self.said)
        for encoded in self._encoded([replay.weighted(wanted, before, self.options.seed)]):
            if encoded.bad:
                self.bad.add(encoded.bad)
                skipped.add(encoded.bad)
            else:
                train.add(encoded)
        del self.said[said:]  # the weight, which nobody has given
        count = train.counts.examples - before
        self.said.append(
            f"Mixed in for replay: {counted(count, 'row')} of {wanted.source.path}, "
            f"{count / max(1, before + count):.1%} of all"
        )

    def _left_out_told(self) -> list[str]:
        return [f"Left out, {counted(count, 'row')} {why}" for why, count in self.left_out.items()]

    def _why_nothing(self) -> str:
        reasons = [*self._left_out_told(), *([self.bad.told()] if self.bad.total else [])]
        return "\n".join(reasons)

    def _table(self, name: str) -> Table:
        folder = self.folder / name
        folder.mkdir()
        reference = self.pairs.reference if self.pairs else last_answer(self.tokenizer)
        return Table(
            folder,
            reference if name == EVALUATION else None,
            form=self.form,
            length=self.options.max_length,
            columns=self.pairs.columns if self.pairs else None,
        )

    def _name_classes(self) -> list[str]:
        """Go through the training data for its classes, before any row becomes tokens."""
        assert isinstance(self.pairs, LabelledRows)
        for example in self._examples(self.options.data):
            if isinstance(example, Labelled):
                self.classes.add(example)
        self.said.clear()  # it is said again
        self.shapes.clear()
        self.pairs.names = self.classes.names(self.known_classes) if self.classes.counts else []
        return self.pairs.names

    def _encoded(self, sources: Iterable[Source]) -> Iterator[Any]:
        options = self.options
        if self.pairs:
            return self.pairs.encode(self._examples(sources))
        return encode_examples(
            self._examples(sources),
            self.tokenizer,
            sys.maxsize if self.form == "blocks" else options.max_length,
            chat_template=options.chat_template,
            thinking=options.thinking,
            train_on=options.train_on,
            parse_special_tokens=options.parse_special_tokens,
        )

    def _examples(self, sources: Iterable[Source]) -> Iterator[Example | BadRow]:
        options = self.options
        for source in sources:
            rows = read_source(
                source,
                self.progress,
                seed=options.seed,
                said=self.said,
                encoding=source.encoding or options.encoding,
                split_text=source.split_text or options.split_text,
            )
            if options.task == "classify":
                columns, template = source.columns or options.columns, source.template or options.template
                yield from labelled_of(rows, columns=columns, template=template)
                continue
            examples = (sequences_of if options.task == "seq2seq" else examples_of)(
                rows,
                format=source.format or options.format,
                columns=source.columns or options.columns,
                template=source.template or options.template,
                counts=self.shapes,
            )
            for example in map(self.take, examples) if self.take else examples:
                if isinstance(example, LeftOut):
                    self.left_out[example.why] += 1
                else:
                    yield example

    def _draw(self, rows: Iterable[Any]) -> int:
        """Return a number below 2**64 that depends on the tokens and the seed alone."""
        digest = hashlib.blake2b(str(self.options.seed).encode(), digest_size=8)
        for row in rows:
            digest.update(row["input_ids"].tobytes())
        return int.from_bytes(digest.digest(), "little")
