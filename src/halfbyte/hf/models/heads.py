"""Models of other tasks than writing on: which class opens them, and their heads, which are trained beside an adapter.

A classification head is new (or was made for other classes), so it is trained whole: PEFT's ``modules_to_save`` keeps
and saves a copy of its own. It is held and computed in fp32, whatever the layers below compute in: it is a thousandth
of the model, and a step of the optimizer would be lost in bf16. What comes to it is cast there, by a hook that PEFT's
copy takes along.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from halfbyte.choices import Task
from halfbyte.errors import InputError
from halfbyte.nn import QuantizedLinear

TASK_TYPES: dict[Task, str] = {"lm": "CAUSAL_LM", "classify": "SEQ_CLS", "seq2seq": "SEQ_2_SEQ_LM"}
"""PEFT's names."""
LABELS_FILE = "config.json"
"""Beside an adapter: the base model's configuration with the names of the classes, as transformers writes it."""


def check_task(config: Any, task: Task, where: str) -> Any:
    """Return the transformers class that opens the model of ``config`` for ``task``; None leaves the choice.

    Raises:
        InputError: transformers has no such class for this kind of model.
    """
    kind = config.model_type
    if task == "lm":
        return None
    if task == "classify":
        if type(config) not in transformers.AutoModelForSequenceClassification._model_mapping:
            raise InputError(
                f"{where} is a {kind} model, for which transformers has no classification head; take another model "
                "for task classify, such as BERT, RoBERTa or a Llama."
            )
        return transformers.AutoModelForSequenceClassification
    if type(config) not in transformers.AutoModelForSeq2SeqLM._model_mapping:
        raise InputError(
            f"{where} is a {kind} model, which is not an encoder with a decoder, as task seq2seq needs; name one, such "
            "as T5 or BART, or leave task out."
        )
    return transformers.AutoModelForSeq2SeqLM


def is_classifier(model: nn.Module) -> bool:
    """Tell whether ``model`` is of one of transformers' classes of classifiers (5.23, whose table is private)."""
    kinds = transformers.AutoModelForSequenceClassification._model_mapping.values()
    return isinstance(model, tuple(kind for kind in kinds if isinstance(kind, type)))


def class_settings(names: Sequence[str]) -> dict[str, Any]:
    """Return what a model's configuration says of classes with these names, by their numbers."""
    return {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {name: number for number, name in enumerate(names)},
        "problem_type": "single_label_classification",
    }


def set_classes(config: Any, names: Sequence[str]) -> None:
    """Write the names of the classes into a model's configuration."""
    for key, value in class_settings(names).items():
        setattr(config, key, value)


def classes_of(config: Any) -> list[str] | None:
    """Return the names of the classes in a model's configuration, or None where they are made up (``LABEL_0`` ...)."""
    names = [name for _, name in sorted((int(number), name) for number, name in (config.id2label or {}).items())]
    return None if names == [f"LABEL_{number}" for number in range(len(names))] else names


def set_pad(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Tell a model the pad token, by which a decoder finds the last token of a text to classify."""
    pad = tokenizer.pad_token_id or 0
    for config in (model.config, model.config.get_text_config()):
        config.pad_token_id = pad


def head_names(model: PreTrainedModel) -> list[str]:
    """Return the names of a classifier's modules that are trained whole: its head, and a pooler that is new."""
    base = model.base_model
    if base is model:
        raise InputError(f"{type(model).__name__} has no base model apart from its head; classify with another model.")
    children = list(model.named_children())
    names = [name for name, child in children if child is not base and any(True for _ in child.parameters())]
    pooler = getattr(base, "pooler", None)
    if isinstance(pooler, nn.Module) and any(_is_dense(module) for module in pooler.modules()):
        names.append(f"{next(name for name, child in children if child is base)}.pooler")
    return names


def modules_within(model: PreTrainedModel, names: Sequence[str]) -> list[str]:
    """Return the names of the modules ``names`` and of all within them, which get no LoRA."""
    return [
        path
        for name in names
        for path in (name, *(f"{name}.{i}" for i, _ in model.get_submodule(name).named_modules() if i))
    ]


def _is_dense(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and not isinstance(module, QuantizedLinear)


def hold_in_fp32(model: PreTrainedModel) -> None:
    """Make a classifier's head fp32, and what comes into it; the loader has left it dense."""
    for name in head_names(model):
        head = model.get_submodule(name).float()
        if _in_fp32 not in head._forward_pre_hooks.values():
            head.register_forward_pre_hook(_in_fp32, with_kwargs=True)


def _in_fp32(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return tuple(map(_cast, args)), {name: _cast(value) for name, value in kwargs.items()}


def _cast(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def save_config(model: Any, folder: Path) -> None:
    """Write the configuration of a classifier beside its adapter: the base model's own, with the classes' names.

    transformers opens the dense base model with it (``from_pretrained(base, config=...)``), before PEFT puts the
    adapter on.
    """
    base = model.get_base_model()
    about = base.config.to_dict() | {"architectures": [type(base).__name__]}
    about.pop("quantization_config", None)
    (folder / LABELS_FILE).write_text(json.dumps(about, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def adapter_task(about: dict[str, Any]) -> Task:
    """Return the task of an adapter by its ``adapter_config.json``."""
    return next((task for task, name in TASK_TYPES.items() if name == about.get("task_type")), "lm")


def adapter_classes(folder: Path) -> list[str] | None:
    """Return the names of a classifier's classes from the folder of its adapter.

    Where PEFT alone has written the folder, the head's rows say how many there are; None where nothing does.
    """
    if (folder / LABELS_FILE).is_file():
        config = AutoConfig.from_pretrained(folder)
        return [name for _, name in sorted(config.id2label.items())]
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        return None
    with safe_open(file, "pt") as weights:
        heads = [name for name in weights.keys() if ".lora_" not in name and name.endswith("weight")]  # noqa: SIM118
        shapes = [shape for name in heads if len(shape := weights.get_slice(name).get_shape()) == 2]
    rows = min((shape[0] for shape in shapes), default=0)  # of the layers of a head its last is the narrowest
    return [f"LABEL_{number}" for number in range(rows)] if rows else None
