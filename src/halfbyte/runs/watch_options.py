"""The options that say how a run is watched: evaluations, samples, when it stops, who hears of it. Imports no torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self, get_args

from pydantic import Field, field_validator, model_validator

from halfbyte.choices import BUILTIN, Logger
from halfbyte.errors import InputError, nearest
from halfbyte.files import absolute
from halfbyte.options import Options
from halfbyte.runs.keep_options import CHANGEABLE

LOGGERS: tuple[str, ...] = get_args(Logger)


class WatchOptions(Options):
    """How a run is watched. Part of its configuration."""

    eval_before: bool = Field(
        default=True,
        json_schema_extra=CHANGEABLE,
        description="Evaluate before the first step too, where there is evaluation data.",
    )
    eval_samples: int = Field(
        default=32,
        ge=0,
        description="Rows of the evaluation data that the model answers at each evaluation, for ROUGE-L, exact match "
        "and the accuracy of a closed set of answers; 0: none.",
    )
    sample_prompts: str | list[str] | None = Field(
        default=None,
        json_schema_extra=CHANGEABLE,
        description="Prompts that are answered before training and at each evaluation: a text file with one a line, "
        "or a list; without it those of three rows. An empty list (none): no samples.",
    )
    max_new_tokens: int = Field(
        default=64,
        ge=1,
        json_schema_extra=CHANGEABLE,
        description="Tokens that such an answer may have.",
    )
    early_stopping_patience: int | None = Field(
        default=None, ge=1, description="Stop after so many evaluations that were no better than the best one."
    )
    early_stopping_threshold: float = Field(
        default=0.0, ge=0, description="How much better an evaluation has to be to count as such for early stopping."
    )
    metric_for_best: str = Field(
        default="loss",
        description="Figure of the evaluations by which the best one is told, such as rouge_l; losses and perplexity "
        "are the better the lower, others the higher.",
    )
    forgetting_data: str | None = Field(
        default=None,
        description="A file of general text whose loss is told at each evaluation as general_loss; builtin: the one "
        "that comes with halfbyte.",
    )
    report_to: str | list[str] | None = Field(
        default=None,
        json_schema_extra=CHANGEABLE,
        description="Where metrics are sent beside the run folder: tensorboard, trackio, wandb, mlflow, several with "
        "commas between.",
    )

    @model_validator(mode="before")
    @classmethod
    def _best_of_early_stopping(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and values.get("early_stopping_patience") and values.get("keep_best") is None:
            return dict(values) | {"keep_best": True}
        return values

    @field_validator("sample_prompts", mode="before")
    @classmethod
    def _named_prompts(cls, given: Any) -> Any:
        """Read the prompts of a file, so that the configuration of the run holds them."""
        if not isinstance(given, str):
            return given
        if given.strip() in ("", "none", "[]"):
            return []
        try:
            lines = absolute(given).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise ValueError(f"should be a text file with a prompt a line, or a list ({why})") from None
        return [line for line in lines if line.strip()]

    @field_validator("sample_prompts", mode="after")
    @classmethod
    def _full_prompts(cls, given: list[str] | None) -> list[str] | None:
        if any(not prompt.strip() for prompt in given or ()):
            raise ValueError("should have no empty prompt")
        return given

    @field_validator("report_to", mode="before")
    @classmethod
    def _several(cls, given: Any) -> Any:
        words = [word.strip() for word in given.split(",")] if isinstance(given, str) else given
        return None if words in ([], [""], ["none"]) else words

    @field_validator("report_to", mode="after")
    @classmethod
    def _known_loggers(cls, given: list[str] | None) -> list[str] | None:
        for word in given or ():
            if word not in LOGGERS:
                raise InputError(
                    f"nothing is known of {word!r}{nearest(word, LOGGERS)}; there is {', '.join(LOGGERS)}."
                )
        return given

    @field_validator("forgetting_data", mode="after")
    @classmethod
    def _absolute_text(cls, given: str | None) -> str | None:
        return given if given in (None, BUILTIN) else str(absolute(given))

    @model_validator(mode="after")
    def _threshold_of_patience(self) -> Self:
        if self.early_stopping_threshold and not self.early_stopping_patience:
            raise ValueError("early_stopping_threshold says nothing without early_stopping_patience; give both")
        return self

    @property
    def loggers(self) -> list[str]:
        """Whom the run reports to."""
        return list(self.report_to or ())

    @property
    def general_file(self) -> Path | None:
        """The file of general text, if it is the user's."""
        return Path(self.forgetting_data) if self.forgetting_data not in (None, BUILTIN) else None
