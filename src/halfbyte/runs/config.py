"""Every option of a training run, once: its name, type, bounds, default and meaning.

The defaults are the paper's recipe (QLoRA, arXiv 2305.14314, appendix B.2, for models up to 13B): LoRA with rank 64
and alpha 16 on every linear layer, dropout 0.1, NF4 with double quantization, a constant learning rate of 2e-4, 16
sequences a step grouped by length, Adam with beta2 0.999, gradients clipped to norm 0.3, paged optimizer state.
A preset changes defaults; what is given explicitly wins over it.

Command-line flags and documentation are made from the fields below. Importing this module imports no torch.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import ByteSize, Field, field_validator, model_validator

from halfbyte.choices import (
    BLOCKSIZE,
    BLOCKSIZES,
    COMPUTE_DTYPE,
    DOUBLE_QUANT,
    QUANT_TYPE,
    QUANT_TYPES,
    REFERENCED,
    SMOOTHED,
    TRANSFORMERS_OPTIMIZERS,
    WATCHING,
    Device,
    DpoLoss,
    FloatType,
    KtoLoss,
    Optimizer,
    Preset,
    QuantType,
    Schedule,
)
from halfbyte.data.options import DataOptions
from halfbyte.errors import InputError, nearest
from halfbyte.files import absolute, write_text
from halfbyte.options import base_format, not_empty
from halfbyte.runs.adapter_options import OF_AN_ADAPTER, AdapterOptions
from halfbyte.runs.keep_options import CHANGEABLE, GROWING, OF_THE_CALL, KeepOptions
from halfbyte.runs.process_options import ProcessOptions
from halfbyte.runs.watch_options import WatchOptions

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "paper-7b": {},
    "paper-13b": {},
    "paper-33b": {"learning_rate": 1e-4, "lora_dropout": 0.05, "gradient_accumulation_steps": 8},
    "paper-65b": {"learning_rate": 1e-4, "lora_dropout": 0.05, "gradient_accumulation_steps": 16},
    "quick": {
        "rank": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.0,
        "learning_rate": 5e-4,
        "lr_scheduler_type": "linear",
        "epochs": 1,
        "batch_size": 16,
        "gradient_accumulation_steps": 1,
    },
}

METHOD_DEFAULTS: dict[tuple[str, str], dict[str, Any]] = {
    ("dpo", "paper"): {"learning_rate": 5e-6, "lora_dropout": 0.0},
    ("kto", "paper"): {"learning_rate": 5e-6, "lora_dropout": 0.0},
    ("orpo", "paper"): {"learning_rate": 8e-5, "lora_dropout": 0.0},
    ("dpo", "quick"): {"learning_rate": 5e-5},
    ("kto", "quick"): {"learning_rate": 5e-5},
    ("orpo", "quick"): {"learning_rate": 2e-4},
}
"""What a method changes of a preset. DPO's rate is that of alignment-handbook's zephyr-7b-dpo-qlora and of TRL's LoRA
example; KTO's is the same, as TRL advises (its documentation: 5e-7 to 5e-6 for beta 0.1); ORPO's is that of TRL's LoRA
example (examples/scripts/orpo.py). The quick ones are for models of some hundred million parameters. Dropout is off, as
TRL's trainers have it: the log-ratios would be of two different models."""


def _of(*methods: str) -> Any:
    """Mark an option that belongs to these methods alone."""
    return {"methods": methods}


def options_of(method: str) -> frozenset[str]:
    """Return the options that belong to ``method`` and not to every method."""
    return frozenset(name for name, methods in _owners().items() if method in methods)


def _owners() -> dict[str, tuple[str, ...]]:
    extras: dict[str, Any] = {name: field.json_schema_extra or {} for name, field in TrainConfig.model_fields.items()}
    return {name: extra["methods"] for name, extra in extras.items() if "methods" in extra}


class TrainConfig(WatchOptions, KeepOptions, ProcessOptions, AdapterOptions, DataOptions):
    """The configuration of one run. Build it from YAML and overrides with :meth:`from_yaml`."""

    output: Path = Field(description="Run folder: the adapter, its configuration, metrics and checkpoints.")
    preset: Preset = Field(
        default="paper",
        description="Which defaults apply: the paper's, as they are for models up to 13B or by size (paper-33b, "
        "paper-65b ...), or quick ones for small models and data.",
    )

    quant_type: QuantType = Field(
        default=QUANT_TYPE,
        description="Number format of the base weights: 4 bits, int8, or none, which leaves them in compute_dtype.",
    )
    blocksize: int | None = Field(
        default=BLOCKSIZE, ge=BLOCKSIZES[0], le=BLOCKSIZES[-1], description="Weights that share one absmax."
    )
    double_quant: bool | None = Field(
        default=DOUBLE_QUANT, description="Quantize the absmax values too; for 4 bits alone."
    )
    compute_dtype: FloatType = Field(
        default=COMPUTE_DTYPE, description="Type of activations and of weights while they are multiplied."
    )
    device: Device = Field(
        default="auto", description="Where the model runs; auto: on the CUDA GPU if torch sees one, or else on the CPU."
    )

    rank: int = Field(default=64, ge=1, description="Rank of the LoRA matrices.")
    lora_alpha: float = Field(default=16, gt=0, description="LoRA scale: updates are multiplied by lora_alpha / rank.")
    lora_dropout: float = Field(default=0.1, ge=0, lt=1, description="Dropout on the input of the LoRA matrices.")
    target_modules: str | list[str] = Field(
        default="all-linear", description="Layers that get LoRA: all-linear, a list of names, or a regular expression."
    )

    epochs: float = Field(default=3, gt=0, json_schema_extra=GROWING, description="Passes over the data.")
    max_steps: int | None = Field(
        default=None, ge=1, json_schema_extra=GROWING, description="Optimizer steps; takes the place of epochs."
    )
    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        default=4,
        description="Rows per forward pass; auto: as many as memory allows, with as many rows a step as without it.",
    )
    gradient_accumulation_steps: int = Field(default=4, ge=1, description="Forward passes per optimizer step.")
    group_by_length: bool = Field(default=True, description="Put sequences of similar length into one batch.")
    packing: bool | None = Field(
        default=None,
        description="Put the rows of a step one behind the other in place of padding them; without it, where that "
        "pays. The step trains on the same rows.",
    )
    memory: ByteSize | None = Field(
        default=None,
        json_schema_extra=CHANGEABLE,
        description="Memory for the process, such as 8GiB, on a GPU of the GPU's; activations that do not fit are "
        "recomputed in the backward pass, and a base that does not is read from its file as it is used. Without it: "
        "what is free.",
    )
    gradient_checkpointing: bool | None = Field(
        default=None,
        json_schema_extra=CHANGEABLE,
        description="Recompute all activations, or none, whatever the memory; without it memory decides.",
    )

    optimizer: Optimizer = Field(
        default="paged_adamw_8bit",
        description="AdamW or Lion by the bits of its state and whether that can be paged to disk (adamw_torch: with "
        "torch's own bits), or one of transformers'.",
    )
    learning_rate: float = Field(default=2e-4, gt=0, description="Peak learning rate.")
    lr_scheduler_type: Schedule = Field(
        default="constant", description="Course of the learning rate after the warm-up; linear and cosine fall to zero."
    )
    lr_scheduler_kwargs: dict[str, int | float | str | bool] | None = Field(
        default=None, description="What the schedule is told besides: num_cycles=2, or min_lr_rate=0.1."
    )
    warmup_ratio: float = Field(
        default=0.0, ge=0, lt=1, description="Share of the steps in which the learning rate rises."
    )
    weight_decay: float = Field(default=0.0, ge=0, description="Weight decay, not of norms and biases.")
    adam_beta1: float = Field(default=0.9, ge=0, lt=1, description="AdamW's and Lion's first beta.")
    adam_beta2: float = Field(default=0.999, ge=0, lt=1, description="AdamW's and Lion's second beta.")
    max_grad_norm: float = Field(
        default=0.3, ge=0, description="Gradients are scaled down to this norm; 0 leaves them."
    )

    beta: float = Field(
        default=0.1,
        gt=0,
        json_schema_extra=_of("dpo", "kto", "orpo"),
        description="dpo, kto: how much the model is held to the one before training. orpo: weight of the odds ratio.",
    )
    loss_type: DpoLoss | KtoLoss | None = Field(
        default=None,
        json_schema_extra=_of("dpo", "kto"),
        description="Loss, by TRL's names; without it sigmoid for dpo, kto for kto.",
    )
    label_smoothing: float = Field(
        default=0.0,
        ge=0,
        lt=0.5,
        json_schema_extra=_of("dpo"),
        description=f"Share of the pairs taken to be the wrong way round, of the losses {', '.join(SMOOTHED)}.",
    )
    precompute_ref_log_probs: bool = Field(
        default=False,
        json_schema_extra=_of("dpo"),
        description="Compute the untrained model's log-probabilities once, before training, and not in each step; pays "
        "from two passes over the data on.",
    )
    desirable_weight: float = Field(
        default=1.0, gt=0, json_schema_extra=_of("kto"), description="Weight of answers that are good."
    )
    undesirable_weight: float = Field(
        default=1.0, gt=0, json_schema_extra=_of("kto"), description="Weight of answers that are bad."
    )

    save_steps: int = Field(
        default=50, ge=1, json_schema_extra=CHANGEABLE, description="Optimizer steps between checkpoints."
    )
    eval_steps: int | None = Field(
        default=None,
        ge=1,
        json_schema_extra=CHANGEABLE,
        description="Optimizer steps between evaluations; without it there is one at each checkpoint.",
    )
    resume: bool = Field(
        default=False, json_schema_extra=OF_THE_CALL, description="Go on from the last checkpoint in the run folder."
    )
    overwrite: bool = Field(
        default=False, json_schema_extra=OF_THE_CALL, description="Replace the run that the run folder holds."
    )

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, values: Any) -> Any:
        given = set(values) if isinstance(values, Mapping) else set()
        if isinstance(values, Mapping) and isinstance(values.get("preset"), str):
            values = PRESETS.get(values["preset"], {}) | dict(values)
        if isinstance(values, Mapping):
            recipe = (str(values.get("method")), str(values.get("preset", "paper")).partition("-")[0])
            own = {name for name in METHOD_DEFAULTS.get(recipe, {}) if name not in given}
            values = dict(values) | {name: METHOD_DEFAULTS[recipe][name] for name in own}
            if values.get("adapter"):
                values = {name: value for name, value in values.items() if name in given or name not in OF_AN_ADAPTER}
        return values

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_format(cls, values: Any) -> Any:
        """Let what was not given for the number format be what the format has."""
        if not isinstance(values, Mapping) or values.get("quant_type", QUANT_TYPE) not in QUANT_TYPES:
            return values
        blocksize, double_quant = base_format(values.get("quant_type", QUANT_TYPE))
        chosen = {"blocksize": blocksize, "double_quant": double_quant}
        return dict(values) | {key: value for key, value in chosen.items() if values.get(key) is None}

    @model_validator(mode="after")
    def _one_format(self) -> Self:
        try:
            base_format(self.quant_type, self.blocksize, self.double_quant)
        except InputError as error:
            raise ValueError(str(error).removesuffix(".")) from None
        return self

    @field_validator("lr_scheduler_kwargs", mode="before")
    @classmethod
    def _paired_kwargs(cls, given: Any) -> Any:
        if not isinstance(given, str):
            return given
        pairs = [pair.split("=", 1) for pair in given.split(",")]
        if not all(len(pair) == 2 and pair[0].strip() and pair[1].strip() for pair in pairs):
            raise ValueError("must be pairs such as num_cycles=2")
        return {name.strip(): yaml.safe_load(f"[{value.strip()}]")[0] for name, value in pairs}

    @field_validator("lr_scheduler_kwargs", mode="after")
    @classmethod
    def _numbers(cls, given: dict[str, Any] | None) -> dict[str, Any] | None:
        """Read 1e-5 as a number, which YAML (1.1) takes for a word."""
        return given and {name: _number(value) for name, value in given.items()}

    @field_validator("output", mode="before")
    @classmethod
    def _named_folder(cls, name: Any) -> Any:
        return not_empty(name)

    @field_validator("output", mode="after")
    @classmethod
    def _absolute_folder(cls, path: Path) -> Path:
        return absolute(path)

    @model_validator(mode="after")
    def _resume_or_overwrite(self) -> Self:
        if self.resume and self.overwrite:
            raise ValueError("resume and overwrite exclude each other; choose one")
        return self

    @model_validator(mode="after")
    def _with_betas(self) -> Self:
        for name in ("adam_beta1", "adam_beta2"):
            changed = getattr(self, name) != type(self).model_fields[name].default
            if changed and self.optimizer in TRANSFORMERS_OPTIMIZERS:
                raise ValueError(f"{name} is AdamW's and Lion's, but the optimizer is {self.optimizer}; leave it away")
        if self.loraplus_lr_ratio is not None and self.optimizer in TRANSFORMERS_OPTIMIZERS:
            raise ValueError(
                f"loraplus_lr_ratio needs one of halfbyte's optimizers (AdamW, Lion), but the optimizer is "
                f"{self.optimizer}; leave one of them away"
            )
        return self

    @model_validator(mode="after")
    def _watched_loss(self) -> Self:
        for name in ("early_stopping_patience", "keep_best"):
            if getattr(self, name) and not (self.eval_data or self.eval_share):
                raise ValueError(f"{name} goes by evaluations, and there are none; set eval_data or eval_share")
        if self.lr_scheduler_type in WATCHING and self.metric_for_best != "loss":
            raise ValueError(
                f"lr_scheduler_type {self.lr_scheduler_type} goes by the loss of evaluations, so metric_for_best has "
                "to be loss; change one of them"
            )
        if self.replay and self.general_file and str(self.general_file) == self.replay.rpartition("*")[0]:
            raise ValueError("forgetting_data is what replay trains on, so its loss says nothing; name another text")
        return self

    @model_validator(mode="after")
    def _fitting_start(self) -> Self:
        start = self.init_lora_weights
        if self.bias != "none" and self.method in REFERENCED:
            raise ValueError(
                f"bias {self.bias!r} does not go with method {self.method}: biases are the base's, and so would be its "
                "reference's; leave it out"
            )
        if (start == "eva" and self.task != "lm") or (start == "loftq" and self.task == "classify"):
            raise ValueError(f"init_lora_weights {start!r} is for language models, and the task is {self.task}")
        return self

    @model_validator(mode="after")
    def _fitting_loss(self) -> Self:
        words = {"dpo": get_args(DpoLoss), "kto": get_args(KtoLoss)}.get(self.method, ())
        if self.loss_type and words and self.loss_type not in words:
            raise ValueError(
                f"method {self.method} has no loss_type {self.loss_type}{nearest(self.loss_type, words)}; it has "
                f"{', '.join(words)}"
            )
        if self.label_smoothing and self.method == "dpo" and self.loss_type not in SMOOTHED:
            raise ValueError(
                f"label_smoothing belongs to loss_type {', '.join(SMOOTHED)}, but the loss is "
                f"{self.loss_type or 'sigmoid'}; leave it away or change the loss"
            )
        if self.loss_type == "exo_pair" and not self.label_smoothing:
            raise ValueError("loss_type exo_pair needs a label_smoothing above 0, such as 0.001 (arXiv 2402.00856)")
        return self

    @property
    def rows_a_step(self) -> int:
        """Rows of an optimizer step; those of the preset in a pass where ``batch_size`` is ``auto``."""
        usual = PRESETS[self.preset].get("batch_size", type(self).model_fields["batch_size"].default)
        rows = usual if self.batch_size == "auto" else self.batch_size
        return int(rows) * self.gradient_accumulation_steps

    @property
    def rows_a_pass(self) -> int:
        """Rows of a forward pass, once they are known."""
        if self.batch_size == "auto":
            raise ValueError("batch_size is still auto")
        return self.batch_size

    @classmethod
    def fixed_options(cls) -> list[str]:
        """Return the options that have to stay as they were when a run goes on."""
        free = _marked(OF_THE_CALL) | _marked(CHANGEABLE) | _marked(GROWING)
        return [name for name in cls.model_fields if name not in free]

    @classmethod
    def free_options(cls) -> list[str]:
        """Return the options that may be given when a run goes on."""
        return [name for name in cls.model_fields if name in _marked(CHANGEABLE) | _marked(GROWING)]

    def save(self, path: Path) -> None:
        """Write every option of the run but ``resume`` and ``overwrite`` to ``path``, as :meth:`from_yaml` reads it."""
        others = {name for name, methods in _owners().items() if self.method not in methods}
        own = {name for name in OF_AN_ADAPTER if self.adapter and name not in self.model_fields_set}
        values = self.model_dump(mode="json", exclude=_marked(OF_THE_CALL) | others | own)
        write_text(path, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


def _number(value: Any) -> Any:
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _marked(mark: Any) -> set[str]:
    return {name for name, field in TrainConfig.model_fields.items() if field.json_schema_extra == mark}
