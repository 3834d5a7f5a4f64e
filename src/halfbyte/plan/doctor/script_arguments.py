"""The arguments that a script gives to configurations and trainers, against those of the installed libraries."""

import dataclasses
import functools
import importlib.util
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from halfbyte.errors import nearest
from halfbyte.hf.dropin.arguments import SPECIAL
from halfbyte.hf.dropin.old_names import RENAMED, TO_CONFIGURATION, WITHOUT_MEANING
from halfbyte.hf.trainers.arguments import REFUSED
from halfbyte.plan.doctor.finding import Finding
from halfbyte.plan.doctor.reading import UNKNOWN, Call, Script, texts

CONFIGURATIONS: Mapping[str, str] = {
    "TrainingArguments": "transformers",
    "Seq2SeqTrainingArguments": "transformers",
    "SFTConfig": "trl",
    "DPOConfig": "trl",
    "KTOConfig": "trl",
    "LoraConfig": "peft",
}
TRAINERS: Mapping[str, str] = {
    "Trainer": "transformers",
    "Seq2SeqTrainer": "transformers",
    "SFTTrainer": "trl",
    "DPOTrainer": "trl",
    "KTOTrainer": "trl",
}
BITSANDBYTES = "BitsAndBytesConfig"
OURS = ("adamw", "adam_")
"""What the names of optimizers have that are halfbyte's, of those of bitsandbytes'."""
THEIRS = ("bnb", "8bit", "paged")
PACKAGES = ("tensorboard", "wandb", "mlflow", "trackio", "comet_ml", "swanlab")
SERVED = "halfbyte run says so and translates it"


def check(script: Script) -> Iterator[Finding]:
    """Yield arguments that are otherwise today, or that halfbyte does not obey."""
    for call in script.calls:
        if call.last in CONFIGURATIONS:
            yield from _of_configuration(call)
        elif call.last in TRAINERS:
            yield from _of_trainer(call)
        elif call.last == BITSANDBYTES:
            yield from _of_bitsandbytes(call)
        elif call.last == "from_pretrained":
            yield from _of_loading(call)


@functools.cache
def _class(name: str, library: str) -> Any:
    return getattr(importlib.import_module(library), name)


def _of_configuration(call: Call) -> Iterator[Finding]:
    kind = _class(call.last, CONFIGURATIONS[call.last])
    known = {field.name for field in dataclasses.fields(kind) if field.init}
    for name, value in call.keywords.items():
        said = f"{call.place}: {call.last}({name}={_shown(value)})"
        if name not in known:
            yield _old(said, name, known) if call.last != "LoraConfig" else _unknown(said, name, known)
        elif name in REFUSED and value is not None and value is not False and value != "":
            is_trl = CONFIGURATIONS[call.last] == "trl"
            if name in ("fp16", "push_to_hub"):  # which the drop-in answers
                continue
            yield Finding(
                "arguments",
                said,
                f"{'halfbyte refuses it' if is_trl else 'Over 4-bit weights it is not obeyed'}: {REFUSED[name]}.",
                f"Leave {name} out.",
                "fault" if is_trl and value is not UNKNOWN else "warning",
            )
    yield from _of_optimizer(call)
    yield from _of_reports(call)
    if call.keywords.get("fp16") is True and not torch.accelerator.is_available():
        why = "A CPU has units for bfloat16, in which a model over 4 bits computes anyway."
        yield Finding("arguments", f"{call.place}: fp16=True", why, "bf16=True", "note")


def _old(said: str, name: str, known: set[str]) -> Finding:
    if RENAMED.get(name) in known:
        return Finding("arguments", said, f"It is {RENAMED[name]} today; {SERVED}.", f"{RENAMED[name]}=...", "note")
    if name in SPECIAL and (new := SPECIAL[name][0]) in known:
        return Finding("arguments", said, f"{new} says it today; {SERVED}.", f"{new}=...", "note")
    if name == "logging_dir":
        fix = "export TENSORBOARD_LOGGING_DIR=..."
        return Finding("arguments", said, f"A variable of the environment says it today; {SERVED}.", fix, "note")
    if name in WITHOUT_MEANING:
        why = f"It is gone ({WITHOUT_MEANING[name]}); {SERVED}."
        return Finding("arguments", said, why, f"Leave {name} out.", "note")
    return _unknown(said, name, known)


def _unknown(said: str, name: str, known: set[str]) -> Finding:
    return Finding(
        "arguments",
        f"{said}: there is no such argument{nearest(name, known)}",
        "The script ends there with a TypeError.",
        f"Leave {name} out, or call it as it is called in the version that is installed.",
        "fault",
    )


def _of_optimizer(call: Call) -> Iterator[Finding]:
    name = call.keywords.get("optim")
    if not isinstance(name, str) or not any(part in name for part in THEIRS):
        return
    if name.removeprefix("paged_").startswith(OURS):
        yield Finding("optimizer", f"{call.place}: optim={name!r}: halfbyte's AdamW serves it")
    elif importlib.util.find_spec("bitsandbytes") is None:
        yield Finding(
            "optimizer",
            f"{call.place}: optim={name!r}",
            "bitsandbytes alone has it, and is not installed.",
            "optim='paged_adamw_8bit'  # or: pip install bitsandbytes",
            "fault",
        )


def _of_reports(call: Call) -> Iterator[Finding]:
    for name in texts(call.keywords.get("report_to")):
        if name in PACKAGES and importlib.util.find_spec(name) is None:
            yield Finding(
                "reports",
                f"{call.place}: report_to={name!r}, and that is not installed",
                "With plain python that is an error; halfbyte run reports nothing to it.",
                f"pip install {name}  # or report_to='none'",
                "note",
            )


def _of_trainer(call: Call) -> Iterator[Finding]:
    parameters = inspect.signature(_class(call.last, TRAINERS[call.last]).__init__).parameters
    for name, value in call.keywords.items():
        if name in parameters:
            continue
        said = f"{call.place}: {call.last}({name}={_shown(value)})"
        if name == "tokenizer":
            yield Finding("arguments", said, f"It is processing_class today; {SERVED}.", "processing_class=...", "note")
        elif name in TO_CONFIGURATION and TRAINERS[call.last] == "trl":
            config = call.last.replace("Trainer", "Config")
            yield Finding(
                "arguments", said, f"It belongs to {config} today; {SERVED}.", f"{config}({name}=...)", "note"
            )
        else:
            yield _unknown(said, name, set(parameters))


def _of_bitsandbytes(call: Call) -> Iterator[Finding]:
    wished = ", ".join(f"{name}={_shown(value)}" for name, value in call.keywords.items())
    there = importlib.util.find_spec("bitsandbytes") is not None
    yield Finding(
        "4 bits",
        f"{call.place}: {BITSANDBYTES}({wished})",
        f"With plain python bitsandbytes {'computes this on the CPU, slowly' if there else 'is missing for it'}; "
        "halfbyte run holds the same bytes in its own layers."
        if not torch.cuda.is_available()
        else "halfbyte run holds the same bytes in its own layers.",
        "halfbyte run SCRIPT",
        "note",
    )
    dtype = call.keywords.get("bnb_4bit_compute_dtype")
    if isinstance(dtype, str) and dtype.endswith("float16") and not dtype.endswith("bfloat16"):
        why = "On a CPU halfbyte computes in bfloat16 then; float16 ends in infinities where values are large."
        yield Finding("4 bits", f"{call.place}: bnb_4bit_compute_dtype=torch.float16", why, "torch.bfloat16", "note")
    elif "bnb_4bit_compute_dtype" not in call.keywords and call.keywords.get("load_in_4bit"):
        why = (
            "Its default is float32: over a 16-bit model halfbyte computes in bfloat16, bitsandbytes slowly in float32."
        )
        fix = "bnb_4bit_compute_dtype=torch.bfloat16"
        yield Finding("4 bits", f"{call.place}: no bnb_4bit_compute_dtype is given", why, fix, "note")


def _of_loading(call: Call) -> Iterator[Finding]:
    wished = sorted(name for name in call.keywords if name.startswith(("load_in_", "bnb_4bit_")))
    if wished:
        yield Finding(
            "arguments",
            f"{call.place}: from_pretrained({', '.join(f'{name}={_shown(call.keywords[name])}' for name in wished)})",
            f"These went into BitsAndBytesConfig with transformers 5; {SERVED}.",
            "quantization_config=BitsAndBytesConfig(load_in_4bit=True)",
            "note",
        )
    attention = call.keywords.get("attn_implementation")
    if attention == "flash_attention_2" or call.keywords.get("use_flash_attention_2"):
        yield Finding(
            "attention",
            f"{call.place}: flash attention",
            f"It is a GPU's, and a package of its own; {SERVED}: attention over key ranges takes its place.",
            'attn_implementation="sdpa"',
            "note",
        )


def _shown(value: Any) -> str:
    if value is UNKNOWN:
        return "..."
    return value if isinstance(value, str) and value.startswith("torch.") else repr(value)
