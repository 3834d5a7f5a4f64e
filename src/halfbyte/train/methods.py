"""The methods of training, a table: what data each learns from, which options are its own, and its trainer.

A new method is one entry here and its word in :data:`halfbyte.choices.Method`. An option that is among a method's own
is an error with any method that has it not.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import UnionType
from typing import Any, get_args

from halfbyte import data
from halfbyte.data.examples import BadRow, Chat, Completion, Example, Judged, LeftOut, Preference
from halfbyte.data.forms import GOOD, Form
from halfbyte.errors import InputError
from halfbyte.hf import trainers
from halfbyte.runs.config import TrainConfig, options_of


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
        form: of the rows of its tables.
        collator: makes what makes a batch of such rows, from the options and the pad token.
        figures: what its trainer logs beside the loss that is worth keeping.
        sequences: that go through the model at once for one row.
        packs: whether the rows of a step may be laid one behind the other.
    """

    about: str
    examples: type | UnionType
    adapt: Callable[[Example], Example | BadRow]
    options: frozenset[str]
    arguments: Callable[[TrainConfig, dict[str, Any]], Any]
    trainer: Callable[..., Any]
    form: Form = "answers"
    collator: Callable[[TrainConfig, int | None], Any] = lambda _, pad: data.Collator(pad)
    figures: tuple[str, ...] = ()
    sequences: int = 1
    packs: bool = True

    def take(self, name: str, example: Example | BadRow) -> Example | BadRow:
        """Return ``example`` as this method, called ``name``, learns from it, or a bad row if it cannot."""
        if not isinstance(example, BadRow | self.examples):
            example = self.adapt(example)
        if isinstance(example, BadRow | LeftOut | self.examples):
            return example
        known = " or ".join(shape.__name__ for shape in get_args(self.examples) or (self.examples,))
        shape = type(example).__name__
        return BadRow(
            example.where,
            f"{shape} row for method {name}",
            f"is a {shape}, but method {name} learns from {known} rows; choose another method or other data.",
        )


def answer_of(example: Example) -> Example:
    """Return the answer that a preference prefers, or one that was judged good, as an example; others as they are.

    An answer that was judged bad is left out.
    """
    match example:
        case Preference(prompt=prompt, chosen=answer):
            note = "only the chosen one of two answers is trained"
        case Judged(prompt=prompt, completion=answer, good=True):
            note = "an answer that was judged good is trained"
        case Judged():
            return LeftOut(example.where, "whose answers are judged bad (method kto learns from them too)")
        case _:
            return example
    rest = {"unused": example.unused, "notes": (*example.notes, note)}
    if isinstance(prompt, str) and isinstance(answer, str):
        return Completion(example.where, prompt, answer, **rest)
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    answers = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
    return Chat(example.where, [*turns, *answers], tools=getattr(example, "tools", None), **rest)


def as_it_is(example: Example) -> Example:
    """Return ``example``."""
    return example


def _sft_arguments(config: TrainConfig, common: dict[str, Any]) -> Any:
    return trainers.SFTConfig(**common, dataset_kwargs={"skip_prepare_dataset": True}, remove_unused_columns=False)


def _dpo_arguments(config: TrainConfig, common: dict[str, Any]) -> Any:
    return trainers.DPOConfig(
        **_of_preferences(config, common),
        loss_type=[config.loss_type or "sigmoid"],
        label_smoothing=config.label_smoothing,
        precompute_ref_log_probs=config.precompute_ref_log_probs,
    )


def _kto_arguments(config: TrainConfig, common: dict[str, Any]) -> Any:
    return trainers.KTOConfig(
        **_of_preferences(config, common),
        loss_type=config.loss_type or "kto",
        desirable_weight=config.desirable_weight,
        undesirable_weight=config.undesirable_weight,
    )


def _orpo_arguments(config: TrainConfig, common: dict[str, Any]) -> Any:
    return trainers.ORPOConfig(**_of_preferences(config, common))


def _of_preferences(config: TrainConfig, common: dict[str, Any]) -> dict[str, Any]:
    # rows are cut already; dropout is what lora_dropout says
    own = {"beta": config.beta, "max_length": None, "disable_dropout": False, "remove_unused_columns": False}
    return common | own


def _kto_collator(config: TrainConfig, pad: int | None) -> Any:
    return data.JudgedCollator(pad, config.max_length, config.loss_type != "apo_zero_unpaired")


def _pairs(config: TrainConfig, pad: int | None) -> Any:
    return data.PairCollator(pad)


REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen",
           "logps/rejected")  # fmt: skip


METHODS: dict[str, Method] = {
    "sft": Method(
        about="supervised fine-tuning: from answers, or from texts as they stand",
        examples=data.Chat | data.Completion | data.Text,
        options=options_of("sft"),
        adapt=answer_of,
        arguments=_sft_arguments,
        trainer=trainers.SFTTrainer,
    ),
    "text": Method(
        about="continued pre-training: from texts, one behind the other in blocks of max_length tokens",
        examples=data.Text,
        options=options_of("text"),
        adapt=as_it_is,
        arguments=_sft_arguments,
        trainer=trainers.SFTTrainer,
        form="blocks",
    ),
    "dpo": Method(
        about="direct preference optimization: from pairs of answers (arXiv 2305.18290)",
        examples=data.Preference,
        options=options_of("dpo"),
        adapt=as_it_is,
        arguments=_dpo_arguments,
        trainer=trainers.DPOTrainer,
        form="pairs",
        collator=_pairs,
        figures=REWARDS,
        sequences=2,
        packs=False,
    ),
    "kto": Method(
        about="Kahneman-Tversky optimization: from answers judged good or bad, or pairs (arXiv 2402.01306)",
        examples=data.Judged | data.Preference,
        options=options_of("kto"),
        adapt=as_it_is,
        arguments=_kto_arguments,
        trainer=trainers.KTOTrainer,
        form="judged",
        collator=_kto_collator,
        figures=(*REWARDS, "kl"),
        packs=False,
    ),
    "orpo": Method(
        about="odds ratio preference optimization: from pairs of answers, without a reference (arXiv 2403.07691)",
        examples=data.Preference,
        options=options_of("orpo"),
        adapt=as_it_is,
        arguments=_orpo_arguments,
        trainer=lambda **arguments: trainers.ORPOTrainer(**arguments),
        form="pairs",
        collator=_pairs,
        figures=(*REWARDS, "nll_loss", "log_odds_ratio"),
        sequences=2,
        packs=False,
    ),
}


UNUSED: dict[str, tuple[str, ...]] = {
    "text": ("thinking", "train_on"),
    **dict.fromkeys(("dpo", "kto", "orpo"), ("train_on",)),
}
"""Options of conversations that say nothing to a method: texts have no turns, and what is compared is an answer."""


def check_rows(config: TrainConfig, rows: data.Tokenized) -> list[str]:
    """Hold the rows to what the method needs of all of them together; return what to say of them, a sentence each.

    Raises:
        InputError: they lack something.
    """
    if config.method != "kto":
        return []
    if config.batch_size == 1 and config.loss_type != "apo_zero_unpaired":
        raise InputError(
            "batch_size is 1, but method kto compares each answer with another one of its batch; set it to 2 or more, "
            "or loss_type to apo_zero_unpaired."
        )
    good, count = sum(rows.rows[GOOD]), len(rows.rows)
    if good in (0, count):
        raise InputError(
            f"All {count:,} answers are judged {'good' if good else 'bad'}, but method kto learns from the difference; "
            "add others, or use method sft for good ones."
        )
    line = f"{good:,} answers are judged good and {count - good:,} bad"
    ratio = config.desirable_weight * good / (config.undesirable_weight * (count - good))
    if not 1 <= ratio <= 4 / 3:
        best = config.undesirable_weight * (count - good) / good
        line += (
            f"; the KTO paper (equation 8) advises a desirable_weight of {best:.3g} to {4 / 3 * best:.3g} for that "
            f"(it is {config.desirable_weight:g})"
        )
    return [line]


def method_of(config: TrainConfig) -> Method:
    """Return the method that ``config`` names.

    Raises:
        InputError: an option was given that belongs to other methods only, or says nothing to this one.
    """
    method = METHODS[config.method]
    for option in UNUSED.get(config.method, ()):
        if getattr(config, option) != type(config).model_fields[option].default:
            raise InputError(f"option {option!r} says nothing to method {config.method}; leave it out.")
    for option in sorted(config.model_fields_set - method.options):
        owners = [name for name, other in METHODS.items() if option in other.options]
        if owners:
            raise InputError(
                f"option {option!r} belongs to method {' and '.join(owners)}, but the method is {config.method}; leave "
                "it away or change the method."
            )
    return method
