"""From what a user says of an adapter to PEFT's ``LoraConfig`` (0.21), or refused where it fits nothing.

PEFT itself leaves out patterns, layer numbers and modules that match nothing, and takes a rank that no layer can use.
"""

import copy
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from peft import LoraConfig
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from halfbyte.errors import InputError, nearest
from halfbyte.hf.layers.expert_targets import has_experts, stacks_by_layer, target_experts
from halfbyte.hf.layers.starts import PLAIN
from halfbyte.hf.layers.targets import ALL, check_targets
from halfbyte.nn import QuantizedLinear
from halfbyte.options import check_start

SHOWN = 8


def lora_config(
    model: PreTrainedModel,
    *,
    rank: int,
    lora_alpha: float,
    lora_dropout: float = 0.0,
    target_modules: str | Sequence[str] = ALL,
    exclude_modules: Sequence[str] = (),
    never: Sequence[str] = (),
    layers_to_transform: Sequence[int] | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    use_rslora: bool = False,
    use_dora: bool = False,
    bias: Literal["none", "all", "lora_only"] = "none",
    modules_to_save: Sequence[str] = (),
    token_indices: dict[str, list[int]] | None = None,
    init_lora_weights: str = "default",
    task_type: str = "CAUSAL_LM",
) -> LoraConfig:
    """Return PEFT's configuration of a new adapter for ``model``; the options are PEFT's, with ours for its beginning.

    Args:
        model: the base model; its weights need not be there yet.
        never: layers that get no adapter whatever ``target_modules`` says.
        token_indices: rows that are trained, by the names of embeddings and heads.
        others: as ``halfbyte train`` explains them.

    Raises:
        InputError: an option matches nothing in the model, or does not go with another one, or the rank is larger than
            a layer.
    """
    check_start(init_lora_weights)
    targets = check_targets(model, target_modules)
    paths = [path for path, _ in model.named_modules() if path]
    linear = [path for path, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    for name in exclude_modules:
        found = [path for path in paths if path == name or path.endswith(f".{name}")]
        if not found:
            raise InputError(f"exclude_modules {name!r} matches no module of the model{_near(name, paths)}.")
        within = [[path for path in linear if path.startswith(f"{each}.")] for each in found]
        if all(within):
            raise InputError(
                f"exclude_modules {name!r} matches {found[0]}, which is no layer but holds some; name layers, such as "
                f"{within[0][0]}."
            )
    config = LoraConfig(
        r=rank,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        target_modules=targets,
        exclude_modules=[*never, *exclude_modules] or None,
        rank_pattern=dict(rank_pattern or {}),
        alpha_pattern=dict(alpha_pattern or {}),
        use_rslora=use_rslora,
        use_dora=use_dora,
        bias=bias,
        modules_to_save=[*modules_to_save] or None,
        trainable_token_indices=_rows_alone(token_indices or {}, modules_to_save, targets) or None,
        ensure_weight_tying=_trains_tied(model, modules_to_save),
        init_lora_weights=PLAIN.get(init_lora_weights, True),
        task_type=task_type,
    )
    for name, pattern in (("rank_pattern", rank_pattern), ("alpha_pattern", alpha_pattern)):
        check_expressions(name, pattern or {})
    if layers_to_transform is not None:
        if isinstance(targets, str) and targets != ALL:
            raise InputError(
                "layers_to_transform does not go with target_modules as a regular expression; write the numbers into "
                "that, or give a list of names."
            )
        # PEFT takes layer numbers beside a list alone, and does not ask them of whole paths
        if targets == ALL:
            config.target_modules = {path.rpartition(".")[2] for path in adapted_layers(model, config)}
        config.layers_to_transform = [*layers_to_transform]
    layers = adapted_layers(model, config)
    for number in layers_to_transform or ():
        if not any(f".{number}." in path for path in layers):
            raise InputError(f"layers_to_transform {number} matches no layer of the model, counted from 0.")
    stacks = stacks_by_layer(model)
    names = dict.fromkeys(stacks.get(path, path) for path in layers)
    for name, pattern in (("rank_pattern", rank_pattern), ("alpha_pattern", alpha_pattern)):
        check_pattern(name, pattern or {}, names)
    check_ranks(model, layers)
    _check_saved(model, modules_to_save)
    if has_experts(model):
        target_experts(model, config, layers, plain=init_lora_weights == "default")
    return config


def adapted_layers(model: nn.Module, config: LoraConfig) -> dict[str, tuple[int, float]]:
    """Return the linear layers of a base model that an adapter goes on, by path, with its rank and scale there."""
    config = _maybe_include_all_linear_layers(copy.copy(config), model)
    stacks, found = stacks_by_layer(model), {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and check_target_module_exists(config, path):
            name = stacks.get(path, path)
            rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), name), config.r)
            alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern.keys(), name), config.lora_alpha)
            found[path] = (rank, alpha / (math.sqrt(rank) if config.use_rslora else rank))
    return found


def check_expressions(option: str, pattern: Iterable[str]) -> None:
    """Refuse keys of an option that are no regular expressions.

    Raises:
        InputError: one is none.
    """
    for key in pattern:
        try:
            re.compile(key)
        except re.error as error:
            raise InputError(f"{option} {key!r} is no regular expression ({error}); name a layer.") from error


def check_pattern(option: str, pattern: Mapping[str, float], layers: Iterable[str]) -> None:
    """Refuse keys of an option that match no layer.

    Args:
        option: its name.
        pattern: it.
        layers: paths of those that an adapter goes on; of experts the names of their stacks.

    Raises:
        InputError: one matches none.
    """
    paths = [*layers]
    for key in pattern:
        if not any(get_pattern_key([key], path) == key for path in paths):
            raise InputError(f"{option} {key!r} matches no layer that gets LoRA{_near(key, paths)}.")


def check_ranks(model: nn.Module, layers: Mapping[str, tuple[int, float]]) -> None:
    """Refuse a rank that is larger than a layer's smaller side, and name the smallest of such layers."""
    wrong = [(*_sides(model.get_submodule(path)), path, rank) for path, (rank, _) in layers.items()]
    wrong = [each for each in wrong if each[3] > min(each[:2])]
    if wrong:
        out, width, path, rank = min(wrong, key=lambda each: min(each[:2]))
        name, most = stacks_by_layer(model).get(path, path).rsplit(".", 1)[-1], min(out, width)
        raise InputError(
            f"rank {rank} is larger than the layer {path}, of {out} by {width}; take a rank of at most {most}, for "
            f"that layer alone with rank_pattern {name}={most}."
        )


def _sides(module: Any) -> tuple[int, int]:
    """Return how many values a linear layer gives and takes."""
    if isinstance(module, Conv1D):
        return module.weight.shape[1], module.weight.shape[0]
    return module.out_features, module.in_features


def _check_saved(model: nn.Module, names: Sequence[str]) -> None:
    modules = {path: module for path, module in model.named_modules() if path}
    for name in names:
        found = [path for path in modules if path == name or path.endswith(f".{name}")]
        if not found:
            raise InputError(f"modules_to_save {name!r} matches no module of the model{_near(name, modules)}.")
        for path in found:
            if any(isinstance(part, QuantizedLinear) for part in modules[path].modules()):
                raise InputError(
                    f"modules_to_save {name!r} matches {path}, which holds frozen quantized weights; give it LoRA "
                    "(target_modules), or name a module that stays dense, such as lm_head or embed_tokens."
                )
            if not any(True for _ in modules[path].parameters()):
                raise InputError(f"modules_to_save {name!r} matches {path}, which has nothing to train.")


def _rows_alone(
    indices: Mapping[str, Sequence[int]], saved: Sequence[str], targets: str | Sequence[str]
) -> dict[str, list[int]]:
    """Return the rows that are trained by themselves: not those of a module that is trained as a whole."""
    found = {}
    for path, rows in indices.items():
        if any(path == name or path.endswith(f".{name}") for name in saved):
            continue
        if targets != ALL and check_target_module_exists(LoraConfig(target_modules=targets), path):
            raise InputError(
                f"new_tokens train rows of {path}, and target_modules gives it LoRA; leave one of them out."
            )
        found[path] = [*rows]
    return found


def _trains_tied(model: PreTrainedModel, names: Sequence[str]) -> bool:
    """Whether an embedding is trained as a whole that is the output head too."""
    tied = bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False))
    heads = [model.get_input_embeddings(), model.get_output_embeddings()]
    return tied and any(
        path == name or path.endswith(f".{name}")
        for path, module in model.named_modules()
        if any(module is head for head in heads)
        for name in names
    )


def _near(name: str, paths: Iterable[str]) -> str:
    names = list(dict.fromkeys(path.rsplit(".", 1)[-1] for path in paths))
    hint = nearest(name, names)
    shown = [each for each in names if not each.isdigit()][:SHOWN]
    return hint or f", which has {', '.join(shown)}"
