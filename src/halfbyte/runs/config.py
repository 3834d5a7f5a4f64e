"""Every option of a training run, once: its name, type, bounds, default and meaning.

The defaults are the paper's recipe (QLoRA, arXiv 2305.14314, appendix B.2, for models up to 13B): LoRA with rank 64
and alpha 16 on every linear layer, dropout 0.1, NF4 with double quantization, a constant learning rate of 2e-4, 16
sequences a step grouped by length, Adam with beta2 0.999, gradients clipped to norm 0.3, paged optimizer state.
A preset changes defaults; what is given explicitly wins over it.

Command-line flags and documentation are made from the fields below. Importing this module imports no torch.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import ByteSize, Field, field_validator, model_validator

from halfbyte.choices import (
    BLOCKSIZE,
    BLOCKSIZES,
    COMPUTE_DTYPE,
    DOUBLE_QUANT,
    QUANT_TYPE,
    QUANT_TYPES,
    FloatType,
    Method,
    Optimizer,
    Preset,
    QuantType,
    Schedule,
)
from halfbyte.data.options import DataOptions
from halfbyte.errors import InputError
from halfbyte.files import absolute, write_text
from halfbyte.options import base_format, not_empty

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
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

# Marks of fields: what may change when a run goes on, since its result does not depend on it; and what says how to
# begin, not what to do, and is not written down.
CHANGEABLE: Any = {"on_resume": "may change"}
OF_THE_CALL: Any = {"on_resume": "of the call"}


class TrainConfig(DataOptions):
    """The configuration of one run. Build it from YAML and overrides with :meth:`from_yaml`."""

    output: Path = Field(description="Run folder: the adapter, its configuration, metrics and checkpoints.")
    method: Method = Field(default="sft", description="What is learned: sft, from answers.")
    preset: Preset = Field(
        default="paper", description="Which defaults apply: the paper's, or quick ones for small models and data."
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

    rank: int = Field(default=64, ge=1, description="Rank of the LoRA matrices.")
    lora_alpha: float = Field(default=16, gt=0, description="LoRA scale: updates are multiplied by lora_alpha / rank.")
    lora_dropout: float = Field(default=0.1, ge=0, lt=1, description="Dropout on the input of the LoRA matrices.")
    target_modules: str | list[str] = Field(
        default="all-linear", description="Layers that get LoRA: all-linear, a list of names, or a regular expression."
    )

    epochs: float = Field(default=3, gt=0, description="Passes over the data.")
    max_steps: int | None = Field(default=None, ge=1, description="Optimizer steps; takes the place of epochs.")
    batch_size: int = Field(default=4, ge=1, description="Sequences per forward pass.")
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
        description="Memory for the process, such as 8GiB; activations that do not fit are recomputed in the backward "
        "pass. Without it: what is free.",
    )
    gradient_checkpointing: bool | None = Field(
        default=None,
        json_schema_extra=CHANGEABLE,
        description="Recompute all activations, or none, whatever the memory; without it memory decides.",
    )

    optimizer: Optimizer = Field(
        default="paged_adamw_8bit", description="AdamW by the bits of its state and whether that can be paged to disk."
    )
    learning_rate: float = Field(default=2e-4, gt=0, description="Peak learning rate.")
    lr_scheduler_type: Schedule = Field(
        default="constant", description="Course of the learning rate after the warm-up; linear and cosine fall to zero."
    )
    warmup_ratio: float = Field(
        default=0.0, ge=0, lt=1, description="Share of the steps in which the learning rate rises."
    )
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW's weight decay.")
    adam_beta1: float = Field(default=0.9, ge=0, lt=1, description="AdamW's decay of the mean gradient.")
    adam_beta2: float = Field(default=0.999, ge=0, lt=1, description="AdamW's decay of the mean squared gradient.")
    max_grad_norm: float = Field(
        default=0.3, ge=0, description="Gradients are scaled down to this norm; 0 leaves them."
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
        if isinstance(values, Mapping) and isinstance(values.get("preset"), str):
            return PRESETS.get(values["preset"], {}) | dict(values)
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

    @classmethod
    def fixed_options(cls) -> list[str]:
        """Return the options that have to stay as they were when a run goes on."""
        return [name for name in cls.model_fields if name not in _marked(OF_THE_CALL) | _marked(CHANGEABLE)]

    def save(self, path: Path) -> None:
        """Write every option but ``resume`` and ``overwrite`` to ``path``, as :meth:`from_yaml` reads it."""
        values = self.model_dump(mode="json", exclude=_marked(OF_THE_CALL))
        write_text(path, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


def _marked(mark: Any) -> set[str]:
    return {name for name, field in TrainConfig.model_fields.items() if field.json_schema_extra == mark}
