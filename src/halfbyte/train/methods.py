"""The methods of training, a table: what data each learns from, which options are its own, and its trainer.

A new method is one entry here and its word in :data:`halfbyte.choices.Method`. An option that is among a method's own
is an error with any method that has it not.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import UnionType
from typing import Any, get_args

from halfbyte import data
from halfbyte.data.examples import BadRow, Chat, Completion, Example, Judged, Preference
from halfbyte.errors import InputError
from halfbyte.hf.trainers import SFTConfig, SFTTrainer
from halfbyte.runs.config import TrainConfig


@dataclass(frozen=True)
class Method:
    """One method of training.

    Attributes:
        about: what is learned, in a few words.
        examples: the shapes of data that it learns from, classes of :mod:`halfbyte.data`.
        adapt: makes one of these shapes of another, where it can.
        options: the options that belong to it and not to every method.
        arguments: makes the trainer's configuration from the run's options and what all trainers are told.
        trainer: makes the trainer; takes what :class:`transformers.Trainer` takes.
    """

    about: str
    examples: type | UnionType
    adapt: Callable[[Example], Example | BadRow]
    options: frozenset[str]
    arguments: Callable[[TrainConfig, dict[str, Any]], Any]
    trainer: Callable[..., Any]

    def take(self, name: str, example: Example | BadRow) -> Example | BadRow:
        """Return ``example`` as this method, called ``name``, learns from it, or a bad row if it cannot."""
        if not isinstance(example, BadRow | self.examples):
            example = self.adapt(example)
        if isinstance(example, BadRow | self.examples):
            return example
        known = " or ".join(shape.__name__ for shape in get_args(self.examples) or (self.examples,))
        shape = type(example).__name__
        return BadRow(
            example.where,
            f"{shape} row for method {name}",
            f"is a {shape}, but method {name} learns from {known} rows; choose another method or other data.",
        )


def answer_of(example: Example) -> Example | BadRow:
    """Return the answer that a preference prefers, or one that was judged good, as an example; others as they are."""
    match example:
        case Preference(prompt=prompt, chosen=answer):
            note = "only the chosen one of two answers is trained"
        case Judged(prompt=prompt, completion=answer, good=True):
            note = "an answer that was judged good is trained"
        case Judged():
            return BadRow(example.where, "answer judged bad", "has an answer that was judged bad; leave it out.")
        case _:
            return example
    rest = {"unused": example.unused, "notes": (*example.notes, note)}
    if isinstance(prompt, str) and isinstance(answer, str):
        return Completion(example.where, prompt, answer, **rest)
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    answers = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
    return Chat(example.where, [*turns, *answers], tools=getattr(example, "tools", None), **rest)


def _sft_arguments(config: TrainConfig, common: dict[str, Any]) -> SFTConfig:
    return SFTConfig(**common, dataset_kwargs={"skip_prepare_dataset": True}, remove_unused_columns=False)


METHODS: dict[str, Method] = {
    "sft": Method(
        about="supervised fine-tuning: from answers, or from texts as they stand",
        examples=data.Chat | data.Completion | data.Text,
        options=frozenset(),
        adapt=answer_of,
        arguments=_sft_arguments,
        trainer=SFTTrainer,
    ),
}


def method_of(config: TrainConfig) -> Method:
    """Return the method that ``config`` names.

    Raises:
        InputError: an option was given that belongs to other methods only.
    """
    method = METHODS[config.method]
    for option in sorted(config.model_fields_set - method.options):
        owners = [name for name, other in METHODS.items() if option in other.options]
        if owners:
            raise InputError(
                f"option {option!r} belongs to method {' and '.join(owners)}, but the method is {config.method}; leave "
                "it away or change the method."
            )
    return method
