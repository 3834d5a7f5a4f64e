"""An adapter's folder: its base, whether it fits it, its file, and whether it learnt anything."""

from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfbyte.errors import InputError, counted, named, size_text
from halfbyte.hf.models.adapter_files import put_adapter
from halfbyte.hf.models.configs import ADAPTER, config_at, json_of
from halfbyte.hf.models.heads import adapter_classes, adapter_task, check_task, set_classes
from halfbyte.hf.models.hub import locate
from halfbyte.hf.models.loader import TOKENIZERS
from halfbyte.hf.models.quantize_files import skeleton_of
from halfbyte.hf.models.verify import verify
from halfbyte.plan.doctor.finding import Finding, looked
from halfbyte.plan.doctor.weights import sentence_of
from halfbyte.runs.circumstances import folder_of

FACTORS = (".lora_B.weight", ".lora_embedding_B")
"""How the tensors end that LoRA begins with zeros."""


class Factors:
    """Sees an adapter's tensors; counts those that say whether it was trained."""

    def __init__(self) -> None:
        self.count = self.zeros = 0

    def __call__(self, name: str, tensor: Tensor) -> None:
        """See a tensor."""
        if name.endswith(FACTORS):
            self.count += 1
            self.zeros += not bool(tensor.any())


def examine(folder: Path, progress: Callable[[int, int], None] = lambda *_: None) -> list[Finding]:
    """Look at the adapter in ``folder``."""
    try:
        about = json_of(folder / ADAPTER)
    except InputError as error:
        return [Finding("adapter", str(error), "Nobody knows what its tensors are of.", "Copy it again.", "fault")]
    findings = [Finding("adapter", f"{about.get('peft_type')}, rank {about.get('r')}, over {_base(about)}")]
    findings += looked("base model", lambda: _base_there(folder, about))
    findings += looked("adapter options", lambda: _options(about))
    seen = Factors()
    try:
        found = verify(folder, progress=progress, seen=seen)
    except InputError as error:
        why = "Without its weights there is no adapter."
        return [*findings, Finding("weights", str(error), why, "Copy the adapter again.", "fault")]
    for one in found.findings:
        why = "The adapter is damaged."
        level = "fault" if one.is_fault else "note"
        findings.append(Finding("weights", sentence_of(one), why, "Copy the adapter again.", level))  # type: ignore[arg-type]
    if not found.faults:
        findings.append(
            Finding("weights", f"{counted(found.tensors, 'tensor')} of {size_text(found.nbytes)}: no fault")
        )
        findings += looked("fit", lambda: _fit(folder, about))
    findings += looked("learnt", lambda: learnt(seen))
    if not any((folder / name).is_file() for name in TOKENIZERS):
        findings.append(
            Finding(
                "tokenizer",
                "the folder has none: the base model's is taken",
                "If tokens or a chat template were changed for training, they are lost.",
                "Copy tokenizer.json, tokenizer_config.json and chat_template.jinja from where it was trained.",
                "note",
            )
        )
    return findings


def learnt(seen: Factors) -> Iterator[Finding]:
    """Yield whether an adapter is still as LoRA begins."""
    if seen.count and seen.zeros == seen.count:
        yield Finding(
            "learnt",
            f"all {seen.count} matrices B are zero, as LoRA begins",
            "The adapter changes nothing: the base model answers. It was not trained, or its tensors were saved under "
            "other names.",
            "Look at the learning rate and at whether the trained model is the one that was saved.",
            "fault",
        )
    elif seen.zeros:
        yield Finding(
            "learnt",
            f"{seen.zeros} of {seen.count} matrices B are zero",
            "Those layers were never trained: no token of the data went through them.",
            "",
            "note",
        )


def _base(about: dict[str, Any]) -> str:
    return str(about.get("base_model_name_or_path"))


def _base_there(folder: Path, about: dict[str, Any]) -> Iterator[Finding]:
    base = _base(about)
    if not folder_of(base).exists():
        yield Finding(
            "base model",
            f"{base} is not on this machine",
            "The adapter is nothing without it.",
            f"hf download {base}" if base.count("/") == 1 and not base.startswith((".", "/")) else
            f"Put the model there, or change base_model_name_or_path in {folder / ADAPTER}.",
            "warning",
        )  # fmt: skip


def _fit(folder: Path, about: dict[str, Any]) -> Iterator[Finding]:
    """Yield whether LoRA's tensors fit the base, of which nothing but the configuration is read, if it is here."""
    base = folder_of(_base(about))
    if about.get("peft_type") != "LORA" or not base.exists():
        return
    try:
        config, task = config_at(locate(base), False), adapter_task(about)
    except InputError:  # a base that is damaged, or has code of its own, is looked at by itself
        return
    config.__dict__.pop("quantization_config", None)
    if task == "classify" and (classes := adapter_classes(folder)):
        set_classes(config, classes)
    model = skeleton_of(config, torch.float32, auto_class=check_task(config, task, str(base)))
    try:
        put_adapter(model, folder)
    except InputError as error:
        yield Finding("fit", str(error), "It cannot be opened over that base.", "", "fault")


def _options(about: dict[str, Any]) -> Iterator[Finding]:
    import peft

    kinds = peft.PEFT_TYPE_TO_CONFIG_MAPPING
    kind = kinds.get(about.get("peft_type"))
    if kind is None:
        known = named(sorted(str(getattr(one, "value", one)) for one in kinds))
        yield Finding(
            "adapter options",
            f"peft_type is {about.get('peft_type')!r}, and peft {peft.__version__} knows {known}",
            "It cannot be opened.",
            "Open it with the version of peft that wrote it.",
            "fault",
        )
        return
    unknown = sorted(about.keys() - {field.name for field in fields(kind)})
    if unknown:
        yield Finding(
            "adapter options",
            f"{named(unknown)} {'is' if len(unknown) == 1 else 'are'} not known to peft {peft.__version__}",
            "They were written by another version of peft, and are left out when the adapter is opened: if one of them "
            "changes what is computed, its answers are others.",
            f"halfbyte adapter info {_base(about)}  # shows what is read",
            "note",
        )
