"""The adapter of a run: a new one, begun as its options say, or one that is trained on from."""

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch import Tensor
from transformers import PreTrainedTokenizerBase, set_seed

from halfbyte import data, hf
from halfbyte.choices import REFERENCED
from halfbyte.errors import InputError
from halfbyte.hf.layers.eva import TOKENS, batches_of, begin_with_eva, eva_config
from halfbyte.hf.layers.expert_adapters import set_dropout
from halfbyte.hf.layers.expert_targets import as_peft_reads, as_we_read, has_experts, own_words
from halfbyte.hf.layers.lora_config import adapted_layers, lora_config
from halfbyte.hf.layers.starts import OF_WEIGHTS, begin_lengths, make_room
from halfbyte.hf.layers.targets import ALL
from halfbyte.hf.layers.whole import train_in_fp32
from halfbyte.hf.models import base_files
from halfbyte.hf.models.adapter_files import put_adapter
from halfbyte.hf.models.new_tokens import NewToken, add_tokens, give_rows
from halfbyte.options import is_subtracted
from halfbyte.runs.adapter_options import OF_AN_ADAPTER
from halfbyte.runs.config import TrainConfig
from halfbyte.train.bases import check_base

OWN = dict(zip(OF_AN_ADAPTER, ("r", "lora_alpha", "lora_dropout", "target_modules"), strict=True))
"""Options that an adapter which is trained on from has decided, and PEFT's names for them."""
TOKENIZER = "tokenizer_config.json"


@dataclass
class Beginning:
    """What the adapter of a run needs beside the base model.

    Attributes:
        config: of the run.
        tokens: that were added to the tokenizer.
        rows: the training data, and ``collate`` makes a batch of some; for EVA.
        checkpoint: whose values take the place of the first ones, as soon as it is loaded.
    """

    config: TrainConfig
    tokens: Sequence[NewToken] = ()
    rows: Any = None
    collate: Callable[[Any], dict[str, Tensor]] | None = None
    checkpoint: Path | None = None
    _loftq: hf.LoftQ | None = field(default=None, init=False)

    @contextlib.contextmanager
    def loading(self) -> Iterator[None]:
        """See what has to be seen while the base model is loaded."""
        if self.config.init_lora_weights != "loftq" or not self._begins:
            yield
            return
        self._loftq = hf.LoftQ(lambda model: _lora_config(self.config, model, None), self.config.seed)
        with self._loftq.watching():
            yield

    @property
    def _begins(self) -> bool:
        """Whether the adapter gets its first values; where a checkpoint replaces them, they may be the reference."""
        return not self.checkpoint or self.config.method in REFERENCED

    def put(self, model: Any, **more: Any) -> PeftModel:
        """Put the adapter on the base ``model``, to be trained.

        Args:
            model: as it was loaded.
            **more: what :func:`halfbyte.hf.layers.lora_config.lora_config` is to be told beside the options.

        Raises:
            InputError: its options do not fit the model, or it does not.
        """
        config = self.config
        if config.adapter:
            return _trained_on(config, model)
        indices = give_rows(model, self.tokens) if self.tokens else None
        lora = _lora_config(config, model, indices, **more)
        start = config.init_lora_weights
        if start == "eva":
            ranks = {path: rank for path, (rank, _) in adapted_layers(model, lora).items()}
            if not self.checkpoint:
                widths = [model.get_submodule(path).in_features for path in ranks]
                lora.init_lora_weights, lora.eva_config = "eva", eva_config([*ranks.values()], widths)
            else:
                saved = json.loads((self.checkpoint / "adapter_config.json").read_text(encoding="utf-8"))
                for name in ("rank_pattern", "alpha_pattern", "target_modules", "target_parameters"):
                    setattr(lora, name, saved[name])
                as_we_read(lora)
        set_seed(config.seed)
        try:
            with own_words() if has_experts(model) else contextlib.nullcontext():
                adapted: PeftModel = get_peft_model(model, lora)
        except ValueError as error:
            if "No modules were targeted" in str(error):
                raise InputError(
                    f"target_modules {config.target_modules!r}, less exclude_modules and what is trained whole, leaves "
                    "no layer to put LoRA on; name others, or exclude fewer."
                ) from error
            raise InputError(f"target_modules {config.target_modules!r}: {error}") from error
        if is_subtracted(start) and self.checkpoint:
            make_room(adapted)
        elif start.startswith(OF_WEIGHTS) and self._begins:
            hf.initialize(adapted, start, seed=config.seed)
        elif start == "eva" and not self.checkpoint:
            begin_with_eva(adapted, self._batches(2 * TOKENS * max(ranks.values())))
        elif self._loftq:
            self._loftq.apply(adapted)
        if has_experts(model):
            set_dropout(adapted, "default", config.lora_dropout)
            as_peft_reads(lora)
        begin_lengths(adapted)
        train_in_fp32(adapted)
        return adapted

    def _batches(self, tokens: int) -> list[dict[str, Tensor]]:
        if self.rows is None or self.collate is None:
            raise InputError("init_lora_weights 'eva' runs over the training data, and there is none.")
        order = torch.randperm(len(self.rows), generator=torch.Generator().manual_seed(self.config.seed)).tolist()
        return batches_of(self.rows, self.collate, order, tokens)


def _lora_config(config: TrainConfig, model: Any, indices: dict[str, list[int]] | None, **more: Any) -> Any:
    return lora_config(
        model,
        rank=config.rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=config.target_modules,
        exclude_modules=config.exclude_modules or (),
        never=[*hf.not_linear(model), *more.pop("never", ())],
        layers_to_transform=config.layers_to_transform,  # type: ignore[arg-type]  # its validator has made a list of it
        rank_pattern=config.rank_pattern,
        alpha_pattern=config.alpha_pattern,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        bias=config.bias,
        modules_to_save=[*(config.modules_to_save or ()), *more.pop("modules_to_save", ())],
        token_indices=indices,
        init_lora_weights=config.init_lora_weights,
        **more,
    )


def _trained_on(config: TrainConfig, model: Any) -> PeftModel:
    """Return ``model`` with the adapter that the run trains on from."""
    folder = config.adapter
    if folder is None or not (folder / "adapter_config.json").is_file():
        raise InputError(f"{folder} holds no adapter (adapter_config.json); name the folder of one, or of a run.")
    adapted = put_adapter(model, folder, trained=True)
    own = adapted.peft_config["default"]
    if own.peft_type != "LORA":
        raise InputError(f"{folder} is an adapter of the kind {own.peft_type.value}; only LoRA is trained on from.")
    if own.bias != "none" and config.method in REFERENCED:
        raise InputError(
            f"{folder} has trained biases, which are the base's too, so that method {config.method} has no reference; "
            "choose method orpo, or another adapter."
        )
    for name, theirs in OWN.items():
        given, has = getattr(config, name), getattr(own, theirs)
        same = given in (has, ALL) or (isinstance(has, set) and {*_list(given)} == has)
        if name in config.model_fields_set and not same:
            raise InputError(
                f"{name} {given!r} is not that of the adapter {folder}, which is {has!r}; leave {name} away, or train "
                "a new adapter."
            )
    is_known = base_files.check_base(folder, getattr(model, "opened_from", None))
    check_base(config, folder, own.base_model_name_or_path, is_known)
    train_in_fp32(adapted)
    return adapted


def _list(given: str | Sequence[str]) -> list[str]:
    return given.split(",") if isinstance(given, str) else [*given]


def load_tokenizer(config: TrainConfig) -> tuple[PreTrainedTokenizerBase, list[NewToken]]:
    """Return the tokenizer of a run, and the tokens that its options have added to it.

    Raises:
        InputError: there is no tokenizer, or a token that is to be new is there.
    """
    own = config.adapter is not None and (config.adapter / TOKENIZER).is_file()
    path = config.adapter if own and config.adapter else config.model
    tokenizer = hf.load_tokenizer(path, trust_remote_code=config.trust_remote_code)
    tokens = add_tokens(tokenizer, config.new_tokens) if config.new_tokens else []
    return tokenizer, tokens


def loraplus_groups(config: TrainConfig, model: Any) -> list[dict[str, Any]]:
    """Return the groups of the trained parameters with LoRA+ (arXiv 2402.12354): the steps of B are larger by a ratio.

    They are those of PEFT's ``create_loraplus_optimizer`` (0.21), but for the weight decay, which is the run's.
    """

    def groups(params: list[dict[str, Any]], **_: Any) -> list[dict[str, Any]]:
        return [group for group in params if group["params"]]

    found: list[dict[str, Any]] = create_loraplus_optimizer(
        model,
        groups,
        lr=config.learning_rate,
        loraplus_lr_ratio=config.loraplus_lr_ratio,
        loraplus_weight_decay=config.weight_decay,
    )
    return found


def collator(tokenizer: PreTrainedTokenizerBase) -> Callable[[Any], dict[str, Tensor]]:
    """Return what makes a batch of rows, for EVA."""
    return data.Collator(tokenizer.pad_token_id)
