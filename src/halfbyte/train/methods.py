"""The methods of training, a table: what data each learns from, which options are its own, and its trainer.

A new method is one entry here and its word in :data:`halfbyte.choices.Method`. An option that is among a method's own
is an error with any method that has it not.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from halfbyte import data
from halfbyte.errors import InputError
from halfbyte.hf.trainers import SFTConfig, SFTTrainer
from halfbyte.runs.config import TrainConfig


@dataclass(frozen=True)
class Method:
    """One method of training.

    Attributes:
        about: what is learned, in a few words.
        examples: the shapes of data that it learns from, classes of :mod:`halfbyte.data`.
        options: the options that belong to it and not to every method.
        arguments: makes the trainer's configuration from the run's options and what all trainers are told.
        trainer: makes the trainer; takes what :class:`transformers.Trainer` takes.
    """

    about: str
    examples: tuple[type, ...]
    options: frozenset[str]
    arguments: Callable[[TrainConfig, dict[str, Any]], Any]
    trainer: Callable[..., Any]

    def check_examples(self, name: str, examples: Any) -> Any:
        """Yield ``examples``, each looked at.

        Raises:
            InputError: one is of a shape that this method does not learn from.
        """
        for example in examples:
            if not isinstance(example, self.examples):
                known = " or ".join(shape.__name__ for shape in self.examples)
                raise InputError(
                    f"{example.where} is a {type(example).__name__}, but method {name} learns from {known} rows; "
                    "choose another method or other data."
                )
            yield example


def _sft_arguments(config: TrainConfig, common: dict[str, Any]) -> SFTConfig:
    return SFTConfig(**common, dataset_kwargs={"skip_prepare_dataset": True}, remove_unused_columns=False)


METHODS: dict[str, Method] = {
    "sft": Method(
        about="supervised fine-tuning: from answers, or from texts as they stand",
        examples=(data.Chat, data.Completion, data.Text),
        options=frozenset(),
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
