"""The options that say what is trained on: of ``halfbyte train`` and ``halfbyte data`` alike. Imports no torch."""

from typing import Any, Literal

from pydantic import Field, field_serializer, field_validator, model_validator

from halfbyte.choices import Method, Task
from halfbyte.data import replay
from halfbyte.data.columns import paired
from halfbyte.data.sources import Source, resolve
from halfbyte.files import model_path
from halfbyte.options import Options, not_empty


class DataOptions(Options):
    """Where the data is, how it is read, and what of it is trained. Part of a run's configuration."""

    method: Method = Field(
        default="sft",
        description="What is learned: sft, from answers; text, from texts; dpo and orpo, from pairs of answers; kto, "
        "from answers judged good or bad.",
    )
    model: str = Field(description="Folder or hub id of the base model, in 16 or in 4 bits.")
    task: Task = Field(
        default="lm",
        description="What the model learns: lm, to write answers; classify, to name the class of a text (encoders and "
        "decoders); seq2seq, to turn a text into another (T5, BART).",
    )
    data: list[Source] = Field(
        description="Training data: files, folders, globs, hub ids (user/name:config@split), names of the paper's data "
        "sets, or - for standard input; behind @ a weight, such as a.jsonl@0.3."
    )
    eval_data: list[Source] | None = Field(default=None, description="Evaluation data, named like the training data.")
    eval_share: float | None = Field(
        default=None, gt=0, lt=1, description="Share of the training data that is held out for evaluation."
    )
    replay: str | None = Field(
        default=None,
        json_schema_extra={"methods": ["sft"]},
        description="General rows to mix in, against forgetting: FILE*0.1, a tenth of all rows then.",
    )
    format: str | None = Field(
        default=None, description="Shape of all rows, such as alpaca or sharegpt; without it each row tells its own."
    )
    columns: dict[str, str] | None = Field(
        default=None, description="Columns of one's own: prompt=question,completion=answer."
    )
    template: str | None = Field(
        default=None, description="Text made of a row's columns: 'Translate {source}:'; with a completion, its prompt."
    )
    encoding: str | None = Field(default=None, description="Encoding of text files; without it it is found.")
    split_text: int | Literal["document"] = Field(
        default="document", description="How plain text is divided: a row a file, or pieces of so many characters."
    )
    max_length: int = Field(default=512, ge=2, description="Tokens per sequence; longer ones are cut at the end.")
    chat_template: str | None = Field(
        default=None, description="Chat template in the place of the model's own: a Jinja file, or the name of one of "
        "TRL's, such as qwen3."
    )  # fmt: skip
    thinking: Literal["on", "off"] | None = Field(
        default=None, description="For models that think before they answer: have the template ask for it, or not."
    )
    train_on: Literal["all", "last"] = Field(
        default="all", description="Which answers of a conversation are trained; a turn's own train or weight wins."
    )
    parse_special_tokens: bool = Field(
        default=False, description="Take control tokens that are written out in the data's texts for such."
    )
    skip_bad_rows: bool | Literal["all"] = Field(
        default=False,
        description="Train without rows that cannot be trained on, up to a tenth of them; all: however many.",
    )

    seed: int = Field(
        default=0,
        ge=0,
        lt=2**32,
        description="Seed of the adapter's first values, data order, dropout, and of what is held out.",
    )
    trust_remote_code: bool = Field(default=False, description="Run Python code that comes with the model.")

    @field_validator("model", mode="before")
    @classmethod
    def _named(cls, name: Any) -> Any:
        return not_empty(name)

    @field_validator("model", mode="after")
    @classmethod
    def _absolute_model(cls, name: str) -> str:
        return model_path(name)

    @field_validator("data", "eval_data", mode="before")
    @classmethod
    def _resolved(cls, given: Any) -> Any:
        return None if given is None else resolve(given)

    @field_validator("replay", mode="after")
    @classmethod
    def _absolute_replay(cls, given: str | None) -> str | None:
        return given and replay.written(given)

    @model_validator(mode="after")
    def _replay_of_language(self) -> "DataOptions":
        if self.replay and self.task != "lm":
            raise ValueError(f"replay is for language models, and the task is {self.task}; name the rows as data")
        return self

    @field_serializer("data", "eval_data")
    def _short(self, sources: list[Source] | None) -> Any:
        """Write a source of which only the name was given as that name."""
        if sources is None:
            return None
        dumped = [source.model_dump(mode="json", exclude_defaults=True) for source in sources]
        words = [source["path"] if source.keys() == {"path"} else source for source in dumped]
        return words[0] if len(words) == 1 else words

    @field_validator("columns", mode="before")
    @classmethod
    def _paired(cls, given: Any) -> Any:
        return paired(given) if isinstance(given, str) else given

    @model_validator(mode="after")
    def _one_evaluation(self) -> "DataOptions":
        if self.eval_data and self.eval_share:
            raise ValueError("eval_data and eval_share exclude each other; choose one")
        return self
