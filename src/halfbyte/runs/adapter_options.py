"""The options that say what an adapter is beside its rank, and how it begins. Imports no torch."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from halfbyte.choices import STARTS, Bias
from halfbyte.errors import InputError
from halfbyte.files import absolute
from halfbyte.options import Options, check_start, is_subtracted

OF_AN_ADAPTER = ("rank", "lora_alpha", "lora_dropout", "target_modules")
"""Options that an adapter which is trained on from has decided; presets say nothing of them then."""

OF_A_NEW_ADAPTER = (
    "init_lora_weights", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "exclude_modules",
    "layers_to_transform", "bias", "modules_to_save", "new_tokens",
)  # fmt: skip
"""Options that are refused beside an adapter which is trained on."""


class AdapterOptions(Options):
    """What an adapter is. Part of a run's configuration."""

    adapter: Path | None = Field(
        default=None,
        description="Folder of a LoRA adapter, or of a run, to train on from, over its base model; rank, scale and "
        "layers are its own.",
    )
    init_lora_weights: str = Field(
        default="default", description=f"How the adapter begins: {', '.join(STARTS)} (4 or another number)."
    )
    use_rslora: bool = Field(
        default=False, description="LoRA scale by the root of the rank: lora_alpha / √rank (rsLoRA)."
    )
    use_dora: bool = Field(default=False, description="Train the length of each row of a weight apart (DoRA).")
    loraplus_lr_ratio: float | None = Field(
        default=None, ge=1, description="Learning rate of the LoRA matrices B as a multiple of that of A (LoRA+)."
    )
    rank_pattern: dict[str, PositiveInt] | None = Field(
        default=None, description="Ranks of layers of their own, by names or regular expressions: k_proj=8,mlp.*=32."
    )
    alpha_pattern: dict[str, PositiveFloat] | None = Field(
        default=None, description="lora_alpha of layers of their own, likewise."
    )
    exclude_modules: str | list[str] | None = Field(
        default=None, description="Names of layers that get no LoRA though target_modules has them."
    )
    layers_to_transform: str | list[int] | None = Field(
        default=None, description="Numbers of the layers that get LoRA, from 0: 0-5,8; without it all."
    )
    bias: Bias = Field(
        default="none", description="Biases that are trained: none, all, or lora_only, of layers with LoRA."
    )
    modules_to_save: str | list[str] | None = Field(
        default=None, description="Names of modules that are trained and saved as a whole, such as lm_head."
    )
    new_tokens: str | list[str] | None = Field(
        default=None,
        description="Tokens to add, whose embeddings are trained: a text file with one a line, or words with commas "
        "between.",
    )
    neftune_noise_alpha: float | None = Field(
        default=None, gt=0, description="Size of the noise that is added to embeddings in training (NEFTune)."
    )

    @field_validator("adapter", mode="after")
    @classmethod
    def _absolute_adapter(cls, path: Path | None) -> Path | None:
        return path and absolute(path)

    @field_validator("init_lora_weights", mode="after")
    @classmethod
    def _known_start(cls, name: str) -> str:
        return check_start(name)

    @field_validator("rank_pattern", "alpha_pattern", mode="before")
    @classmethod
    def _paired_patterns(cls, given: Any) -> Any:
        if not isinstance(given, str):
            return given
        pairs = [pair.rsplit("=", 1) for pair in given.split(",")]
        if not all(len(pair) == 2 and pair[0].strip() and pair[1].strip() for pair in pairs):
            raise ValueError("must be pairs such as k_proj=8,mlp.*=32")
        return {name.strip(): value.strip() for name, value in pairs}

    @field_validator("exclude_modules", "modules_to_save", mode="after")
    @classmethod
    def _listed(cls, names: str | list[str] | None) -> list[str] | None:
        if names is None:
            return None
        listed = [name.strip() for name in (names.split(",") if isinstance(names, str) else names)]
        if not all(listed):
            raise ValueError("must be names with commas between")
        return listed

    @field_validator("layers_to_transform", mode="after")
    @classmethod
    def _numbered(cls, given: str | list[int] | None) -> list[int] | None:
        if not isinstance(given, str):
            return given
        return sorted({number for part in given.split(",") for number in _numbers(part.strip())})

    @field_validator("new_tokens", mode="after")
    @classmethod
    def _read(cls, given: str | list[str] | None) -> list[str] | None:
        """Return the tokens, so that a run does not depend on the file that they came from."""
        if isinstance(given, str):
            file = absolute(given)
            if file.is_file():
                try:
                    given = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
                except (OSError, UnicodeDecodeError) as error:
                    raise InputError(f"{file} cannot be read as text: {error}.") from None
            elif given.endswith(".txt") or "/" in given:
                raise InputError(f"there is no file {file}; as a word with commas and slashes, give a list in YAML.")
            else:
                given = [token.strip() for token in given.split(",")]
        if given is not None and (not given or not all(token.strip() for token in given)):
            raise ValueError("must have a token on each line or between commas")
        return list(dict.fromkeys(given)) if given else None

    @model_validator(mode="after")
    def _compatible(self) -> Self:
        start = self.init_lora_weights
        if is_subtracted(start) and self.use_dora:
            raise ValueError(f"init_lora_weights {start} and use_dora exclude each other; choose one")
        if self.neftune_noise_alpha and getattr(self, "packing", None):
            raise ValueError(
                "neftune_noise_alpha and packing exclude each other, since the noise depends on a row's length; choose "
                "one"
            )
        if self.adapter:
            if self.adapter == getattr(self, "output", None):
                raise ValueError(
                    "adapter and output are one folder, and the run would replace its beginning; name another"
                )
            for name in OF_A_NEW_ADAPTER:
                self._refuse_beside_adapter(name)
        return self

    def _refuse_beside_adapter(self, name: str) -> None:
        if getattr(self, name) != type(self).model_fields[name].default:
            raise ValueError(
                f"{name} belongs to a new adapter, but {self.adapter} is trained on; leave one of them away"
            )


def _numbers(part: str) -> Iterator[int]:
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
    if not match or int(match[2] or match[1]) < int(match[1]):
        raise ValueError("must be numbers and ranges such as 0-5,8")
    return iter(range(int(match[1]), int(match[2] or match[1]) + 1))
