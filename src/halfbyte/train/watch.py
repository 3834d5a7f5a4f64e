"""What is measured and shown beside the loss while a run goes: figures of answers, samples, general text, notices.

Evaluations of a run, at step 0, every ``eval_steps`` and after the last step, have these figures:

    loss             of the method, mean over the labels of all rows
    perplexity       e^loss, and token_accuracy, the share of labels that are the likeliest token (sft, text)
    rouge_l          and exact_match of generated answers with those of the rows (sft; ``evaluate/references.py``)
    accuracy         how often the right one of a closed set of answers is preferred (sft; ``evaluate/choices.py``)
    general_loss     of a text that has nothing to do with the task (``forgetting_data``; ``evaluate/texts.py``)
    ...              what a method or a task has beside (``train/methods.py``, ``train/tasks.py``)

Nothing here changes a bit of what is trained: nothing is drawn, and layers are told the same before and after. A run
without evaluation rows has samples and the general loss at the same steps.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from transformers import PreTrainedTokenizerBase, TrainerCallback

from halfbyte import data
from halfbyte.choices import BUILTIN, TYPES_4BIT
from halfbyte.data.examples import Text
from halfbyte.data.table import REFERENCE
from halfbyte.errors import InputError, nearest
from halfbyte.evaluate.choices import score_choices
from halfbyte.evaluate.references import reference_scores
from halfbyte.evaluate.texts import general_texts, summed_loss
from halfbyte.generate.batched import Answer, answer_all
from halfbyte.hf.models.limits import most_positions
from halfbyte.hf.trainers import distributed
from halfbyte.hf.trainers.sharded import is_sharded
from halfbyte.runs.config import TrainConfig
from halfbyte.runs.events import Listener, Note, Sample
from halfbyte.train.notices import Notices
from halfbyte.train.samples import Asked, asked_of, last_answer, prompt_of, told_trouble
from halfbyte.train.steps import evaluation_of

Part = TypeVar("Part")

LOOKED_AT = 2000
"""Rows among which those are chosen that are answered."""
MOST_CHOICES = 20
"""Different answers that are still a closed set."""
GENERAL_LENGTH, GENERAL_ROWS = 512, 64
"""Tokens of a row of general text, and how many rows of a file are read."""


@dataclass(frozen=True)
class Questions:
    """Rows of the evaluation data that are answered: their prompts and references, and the rows themselves.

    Attributes:
        is_closed: whether the answers are a closed set.
    """

    rows: list[dict[str, Any]]
    prompts: list[list[int]]
    references: list[str]
    is_closed: bool


def questions_of(config: TrainConfig, rows: data.Prepared) -> Questions | None:
    """Return the rows that are answered at each evaluation: spread over those whose answers are not too long."""
    wanted = rows.evaluation is not None and config.method == "sft" and config.task == "lm"
    if not wanted or not config.eval_samples or rows.evaluation is None:
        return None
    table = rows.evaluation.rows
    some = table.select(_spread(len(table), LOOKED_AT)).to_list()
    stretches = [last_answer(row["labels"]) for row in some]
    fitting = [
        row
        for row, (start, end) in zip(some, stretches, strict=True)
        if start > 1 and end - start <= config.max_new_tokens
    ]
    if not fitting:
        return None
    references = [row[REFERENCE].strip() for row in some]
    firsts = {row["labels"][start] for row, (start, _) in zip(some, stretches, strict=True)}
    different = len(set(references))
    is_closed = 2 <= different <= min(MOST_CHOICES, len(some) // 2) and len(firsts) == different
    chosen = [fitting[place] for place in _spread(len(fitting), config.eval_samples)]
    return Questions(
        rows=chosen,
        prompts=[prompt_of(row) for row in chosen],
        references=[row[REFERENCE] for row in chosen],
        is_closed=is_closed,
    )


def _spread(count: int, wanted: int) -> list[int]:
    """Return ``wanted`` numbers below ``count``, evenly spread, or all."""
    return [int(place) for place in np.linspace(0, count, min(count, wanted), endpoint=False)]


def general_rows(config: TrainConfig, tokenizer: PreTrainedTokenizerBase, model: Any) -> list[dict[str, Any]]:
    """Return the rows of general text, if the run has any.

    Raises:
        InputError: it cannot be read.
    """
    if config.forgetting_data is None:
        return []
    length = min(GENERAL_LENGTH, most_positions(model) or GENERAL_LENGTH)
    first, examples = _first(_general_examples(config.forgetting_data))
    form: Any = "blocks" if isinstance(first, Text) else "answers"
    enough = itertools.islice(examples, GENERAL_ROWS * 4)
    rows = data.tokenize(enough, tokenizer, length, form=form, skip_bad_rows=True).rows
    return list(rows.select(range(min(len(rows), GENERAL_ROWS))).to_list())


def check_general(config: TrainConfig) -> None:
    """Look at the first row of general text, before a model is loaded.

    Raises:
        InputError: the task has no use for it, or it cannot be read.
    """
    if config.forgetting_data is not None and config.task != "lm":
        raise InputError(f"forgetting_data is for language models, and the task is {config.task}; leave it out.")
    if config.forgetting_data is not None:
        next(_general_examples(config.forgetting_data), None)


def _general_examples(source: str) -> Iterator[Any]:
    return iter(general_texts() if source == BUILTIN else data.read_examples(source))


def _first(examples: Iterator[Any]) -> tuple[Any, Iterator[Any]]:
    first = next(examples, None)
    return first, itertools.chain([] if first is None else [first], examples)


def notices_of(config: TrainConfig, model: Any) -> Notices:
    """Return what makes notices of a run's numbers."""
    return Notices(
        vocabulary=int(model.config.get_text_config().vocab_size),
        max_grad_norm=config.max_grad_norm,
        is_likelihood=config.task != "classify" and config.method in ("sft", "text"),
        in_4_bits=config.quant_type in TYPES_4BIT,
    )


class Watch(TrainerCallback):  # type: ignore[misc]
    """Measures and shows what is told beside the loss, and says what was seen.

    Args:
        config: of the run.
        model: with its adapter, ready to train.
        tokenizer: its tokenizer.
        rows: what is trained and evaluated on.
        figures: what the method or the task measures in evaluation.
        tell: hears of samples, notes and, without evaluation rows, evaluations.

    Attributes:
        figures: names of all figures that an evaluation has beside the loss.

    Raises:
        InputError: an option does not fit the model, the data or the task.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        rows: data.Prepared,
        figures: Sequence[str],
        tell: Listener,
    ) -> None:
        self.config = config
        self.model = model
        self.tokenizer = tokenizer
        self.tell = tell
        self.asked: list[Asked] = asked_of(config, tokenizer, rows, model)
        self.questions = questions_of(config, rows)
        self.general = general_rows(config, tokenizer, model)
        self.is_evaluated = rows.evaluation is not None
        self.is_sharded = is_sharded(model)
        self.longest = rows.longest
        self.figures = (*figures, *self._own_figures())
        self._check(rows)

    def _own_figures(self) -> Iterator[str]:
        if self.config.task == "lm" and self.config.method in ("sft", "text"):
            yield from ("perplexity", "token_accuracy")
        if self.questions:
            yield from ("rouge_l", "exact_match")
            yield from ("accuracy",) if self.questions.is_closed else ()
        if self.general:
            yield "general_loss"

    def _check(self, rows: data.Prepared) -> None:
        config, best = self.config, self.config.metric_for_best
        if rows.evaluation and best not in ("loss", *self.figures):
            known = ["loss", *self.figures]
            raise InputError(
                f"metric_for_best {best!r} is no figure of this run's evaluations{nearest(best, known)}; they have "
                f"{', '.join(known)}."
            )
        if self.config.eval_samples and rows.evaluation and self._lacks_questions():
            self.tell(
                Note(
                    text=f"No answers are generated for ROUGE-L and exact match: none of the evaluation rows has one "
                    f"of at most {config.max_new_tokens} tokens (max_new_tokens)"
                )
            )

    def _lacks_questions(self) -> bool:
        return self.questions is None and self.config.method == "sft" and self.config.task == "lm"

    def attach(self, trainer: Any, tell: Listener, *, begins: bool) -> None:
        """Have ``trainer`` measure with each evaluation what is measured here.

        Args:
            trainer: of the run.
            tell: hears of everything from here on.
            begins: it starts at step 0.
        """
        self.trainer, self.tell, self.begins = trainer, tell, begins
        trainer.beside = self.measure
        trainer.add_callback(self)

    def measure(self) -> dict[str, float]:
        """Answer the sample prompts and tell the answers, and return the figures; in evaluation mode."""
        self.show(self.trainer.state.global_step)
        return self.measured()

    def show(self, step: int) -> None:
        """Answer the sample prompts, and tell the answers."""
        if not self.asked:
            return
        prompts = [asked.ids for asked in self.asked]
        with distributed.first_writes(distributed.is_first() or self.is_sharded) as answers_here:
            answers = self._answers(prompts) if answers_here else []
        if not distributed.is_first():
            return
        for asked, answer in zip(self.asked, answers, strict=True):
            self.tell(Sample(step=step, prompt=asked.shown, answer=answer.text))
        if step == 0 and (sentence := told_trouble(self.asked, answers, self.tokenizer)):
            self.tell(Note(text=sentence, step=step, trouble=True))

    def _answers(self, prompts: Sequence[Sequence[int]]) -> list[Answer]:
        """Answer prompts, no more together than have the tokens of a training pass, for which there is memory."""
        tokens = self.trainer.args.per_device_train_batch_size * self.longest
        most = self.config.max_new_tokens
        return answer_all(self.model, self.tokenizer, prompts, max_new_tokens=most, most_tokens=tokens)

    def measured(self) -> dict[str, float]:
        """Return the figures that are measured here; the same in all processes, each of which measures a part."""
        figures: dict[str, float] = {}
        if questions := self.questions:
            texts: list[str] = [""] * len(questions.prompts)
            for places, part in self._of_all(lambda own: [x.text for x in self._answers(questions.prompts[own])]):
                texts[places] = part
            figures |= reference_scores(texts, questions.references)
            if questions.is_closed:
                size = self.trainer.args.per_device_eval_batch_size
                figures["accuracy"] = score_choices(self.model, questions.rows, batch_size=size).accuracy
        if self.general:
            sums = [part for _, part in self._of_all(lambda own: summed_loss(self.model, self.general[own]))]
            figures["general_loss"] = sum(loss for loss, _ in sums) / max(1, sum(count for _, count in sums))
        return figures

    def _of_all(self, work: Callable[[slice], Part]) -> list[tuple[slice, Part]]:
        """Return what ``work`` gives for the places of each process; if all have to run together, each does all."""
        if self.is_sharded:
            return [(slice(None), work(slice(None)))]
        places = [slice(rank, None, distributed.world_size()) for rank in range(distributed.world_size())]
        return list(zip(places, distributed.gather(work(places[distributed.rank()])), strict=True))

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Before the first step."""
        if self.begins and not args.eval_on_start:
            self._look(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        """After a step, told already: what evaluations do where there are none."""
        if self.is_evaluated or "loss" not in logs:
            return
        every = self.config.eval_steps
        if state.global_step >= state.max_steps or (every and state.global_step % every == 0):
            self._look(state.global_step)

    def _look(self, step: int) -> None:
        trained = self.model.training
        self.model.eval()
        try:
            self.show(step)
            if figures := ({} if self.is_evaluated else self.measured()):
                self.tell(evaluation_of(step, figures))
        finally:
            self.model.train(trained)
