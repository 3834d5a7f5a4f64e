"""A script for transformers, peft, trl and bitsandbytes: what it asks for that this machine has not, read and not run.

    imports       that fail here, and what stands in for them
    arguments     of configurations and trainers, as they are called today, gone, or refused
    GPU           what is sent there, and whether it is answered
    models, data  on this machine, on the hub, or nowhere
    habits        that cost a training its end: pad is eos, merging into 4 bits
    replaced      the rows of ``halfbyte.install()``'s table that the script meets

What ``halfbyte run SCRIPT`` translates is a note; what it cannot serve is a fault.
"""

import importlib.util
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from halfbyte.errors import InputError, counted
from halfbyte.hf.install import check_versions, table
from halfbyte.hf.replacement import Replacement
from halfbyte.plan.doctor import script_arguments, script_inputs
from halfbyte.plan.doctor.finding import Finding, looked
from halfbyte.plan.doctor.reading import Import, Script, read_script

ELSEWHERE = {
    "unsloth": "Take transformers' AutoModelForCausalLM and peft's get_peft_model in the place of FastLanguageModel.",
    "flash_attn": "Take the import out: attention here needs no package of its own.",
    "xformers": "Take the import out: attention here needs no package of its own.",
    "deepspeed": "Take it out: torchrun -m halfbyte run SCRIPT trains in several processes.",
    "axolotl": "halfbyte convert-config axolotl.yaml",
    "llamafactory": "halfbyte convert-config llama_factory.yaml",
    "vllm": "Serve with halfbyte serve, and ask it by OpenAI's client.",
    "auto_gptq": "Give the GPTQ folder itself as the model: transformers' from_pretrained opens it.",
    "apex": "Take it out: bfloat16 needs no mixed precision.",
    "triton": "Take it out: its kernels are for GPUs.",
}
"""What to do instead of importing a package that needs a GPU."""
NOW = {
    ("transformers", "AdamW"): "from torch.optim import AdamW",
    ("peft", "prepare_model_for_int8_training"): "from peft import prepare_model_for_kbit_training",
    ("peft", "prepare_model_for_training"): "from peft import prepare_model_for_kbit_training",
}
"""Names that were taken out, and what says the same today."""
OWN = ("transformers", "peft", "trl")
"""Libraries whose names are looked up."""
SHADOWED = (
    "torch",
    "transformers",
    "peft",
    "trl",
    "accelerate",
    "datasets",
    "tokenizers",
    "safetensors",
    "numpy",
    "evaluate",
)
SHOWN = 8


def examine(file: Path, cells: Sequence[tuple[str, str]]) -> list[Finding]:
    """Look at a script.

    Args:
        file: its.
        cells: its source with an empty name, or those of a notebook with theirs.

    Raises:
        InputError: it is not Python that could be run.
    """
    script = read_script(cells, str(file))
    rows = table()
    findings: list[Finding] = []
    for what, look in (
        ("imports", lambda: imports(script, rows, file.resolve().parent)),
        ("shadowed", lambda: shadows(file.resolve())),
        ("arguments", lambda: script_arguments.check(script)),
        ("GPU", lambda: gpu(script, rows)),
        ("models", lambda: script_inputs.models(script, file.resolve().parent)),
        ("data", lambda: script_inputs.data(script, file.resolve().parent)),
        ("habits", lambda: habits(script)),
        ("replaced", lambda: replaced(script, rows, file)),
    ):
        findings += looked(what, look)
    name = shlex.quote(str(file))
    return [replace(finding, fix=finding.fix.replace("SCRIPT", name)) for finding in findings]


def imports(script: Script, rows: Sequence[Replacement], folder: Path) -> Iterator[Finding]:
    """Yield imports that fail here."""
    given = {row.where for row in rows}
    seen: set[tuple[str, str]] = set()
    missing = False
    for one in script.imports:
        top = one.module.partition(".")[0]
        if f"sys.modules[{one.module}]" in given or _is_local(top, folder):
            continue
        if importlib.util.find_spec(top) is None:
            if (top, "") not in seen:
                seen.add((top, ""))
                missing = missing or not one.optional
                yield _not_installed(one, top)
        elif top in OWN and (one.module, one.name) not in seen and f"{one.module}:{one.name}" not in given:
            seen.add((one.module, one.name))
            if reason := _lacks(one):
                missing = missing or not one.optional
                yield Finding(
                    "imports",
                    f"{one.place}: {reason}",
                    "The name was there in another version of the library.",
                    NOW.get(
                        (one.module, one.name),
                        f"Take {one.name or one.module} out, or what the library has in its place.",
                    ),
                    "note" if one.optional else "fault",
                )
    if not missing:
        yield Finding("imports", f"{counted(len(script.imports), 'name')}: all that are needed can be imported")


def _is_local(top: str, folder: Path) -> bool:
    return (folder / f"{top}.py").is_file() or (folder / top).is_dir()


def _not_installed(one: Import, top: str) -> Finding:
    return Finding(
        "imports",
        f"{one.place}: {one.module} is not installed",
        "The script goes on without it." if one.optional else "The script ends there with a ModuleNotFoundError.",
        ELSEWHERE.get(top, f"pip install {top.replace('_', '-')}"),
        "note" if one.optional else "fault",
    )


def _lacks(one: Import) -> str:
    """Return what a library has not of an imported name, or nothing."""
    try:
        module = importlib.import_module(one.module)
    except ImportError as error:
        return f"{one.module} cannot be imported ({error})"
    if one.name and one.name != "*" and not hasattr(module, one.name):
        try:
            importlib.import_module(f"{one.module}.{one.name}")
        except ImportError:
            return f"{one.module} has no {one.name}"
    return ""


def shadows(file: Path) -> Iterator[Finding]:
    """Yield files beside the script that are taken for a library of that name."""
    for name in SHADOWED:
        for beside in (file.parent / f"{name}.py", file.parent / name / "__init__.py"):
            if beside.is_file() and beside != file:
                yield Finding(
                    "shadowed",
                    f"{beside} stands beside the script",
                    f"Python looks there first: import {name} gives that file, in the libraries too.",
                    f"mv {beside if beside.stem == name else beside.parent} {file.parent}/my_{name}"
                    f"{'.py' if beside.stem == name else ''}",
                    "fault",
                )


def gpu(script: Script, rows: Sequence[Replacement]) -> Iterator[Finding]:
    """Yield what is asked of a GPU that is not there."""
    if torch.cuda.is_available():
        return
    answered = {row.where for row in rows if row.cuda}
    places: dict[str, str] = {}
    unanswered: dict[str, str] = {}
    called = {call.name for call in script.calls}
    for name, place in script.attributes.items():
        module, _, attribute = name.rpartition(".")
        if module in ("torch.cuda", "torch.accelerator") and attribute[:1].islower() and name in called:
            known = f"{module}:{attribute}" in answered
            (places if known else unanswered)[name] = place
    for call in script.calls:
        devices = [*call.arguments, *(call.keywords.get(key) for key in ("device", "device_map", "map_location"))]
        is_sent = call.last in ("to", "device", "Generator", "set_default_device") or "device" in " ".join(
            call.keywords
        )
        if call.last == "cuda" and call.name not in ("torch.cuda",):
            places.setdefault(".cuda()", call.place)
        elif is_sent and any(isinstance(device, str) and device.startswith("cuda") for device in devices):
            places.setdefault(f'{call.last}("cuda")', call.place)
        if "device_map" in call.keywords:
            places.setdefault(f"device_map={_shown(call.keywords['device_map'])}", call.place)
        if call.last == "init_process_group" and "nccl" in [*call.arguments, *call.keywords.values()]:
            yield Finding(
                "GPU",
                f"{call.place}: init_process_group('nccl')",
                "NCCL joins GPUs alone.",
                "torch.distributed.init_process_group('gloo')",
                "fault",
            )
    if places:
        yield Finding(
            "GPU",
            f"there is none, and the script asks for one: {_listed(places)}",
            "With plain python the script ends there; halfbyte run answers for the GPU, and models stay on the CPU.",
            "halfbyte run SCRIPT",
            "note",
        )
    if unanswered:
        yield Finding(
            "GPU",
            f"there is none, and nothing answers {_listed(unanswered)}",
            "torch raises an error there, if it is reached.",
            "Put it under: if torch.cuda.is_available():, and run with halfbyte run --no-cuda",
            "warning",
        )


def _shown(value: object) -> str:
    return repr(value) if isinstance(value, (str, int, dict)) else "..."


def _listed(places: dict[str, str]) -> str:
    said = [f"{name} ({place})" for name, place in places.items()]
    return ", ".join(said[:SHOWN]) + (f" and {len(said) - SHOWN} more" if len(said) > SHOWN else "")


def habits(script: Script) -> Iterator[Finding]:
    """Yield what is often copied and costs something."""
    for target, value, place in script.assigned:
        if target.endswith(".pad_token") and value.endswith(".eos_token"):
            yield Finding(
                "pad token",
                f"{place}: pad_token = eos_token",
                "Collators that mask padding by its id leave the end of each answer out of the labels, and the model "
                "does not learn to stop.",
                "Take a reserved token for padding; halfbyte's trainers mask by places, so it does no harm there.",
                "note",
            )
    for call in script.calls:
        if call.last == "merge_and_unload":
            yield Finding(
                "merging",
                f"{call.place}: merge_and_unload()",
                "Merged into weights that are rounded to 4 bits, most of what was learnt is lost; halfbyte makes a "
                "dense model of both.",
                "halfbyte merge ADAPTER OUTPUT  # measured by halfbyte audit",
                "note",
            )
    for line in script.shell:
        if "pip install" in line:
            yield Finding(
                "shell",
                line,
                "halfbyte run leaves what is installed as it is: another version of transformers, peft or trl would "
                "not be one that it was read for.",
                level="note",
            )


def replaced(script: Script, rows: Sequence[Replacement], file: Path) -> Iterator[Finding]:
    """Yield what ``halfbyte run`` puts in the place of names that the script uses."""
    try:
        check_versions(list(rows))
    except InputError as error:
        why = "Nothing is replaced over other versions."
        yield Finding("replaced", str(error), why, str(error).rpartition(": ")[2].rstrip("."), "fault")
    met: dict[str, list[str]] = {}
    for row in rows:
        if _is_met(row, script):
            met.setdefault(row.why, []).append(row.where.replace(":", "."))
    if not met:
        yield Finding("replaced", "nothing of this script: halfbyte run and python do the same")
        return
    for why, places in met.items():
        yield Finding("replaced", f"{places[0]}{f' and {len(places) - 1} more' if len(places) > 1 else ''}: {why}")
    yield Finding("run it with", f"halfbyte run {file}")


def _is_met(row: Replacement, script: Script) -> bool:
    """Whether a script comes by what a row replaces."""
    words = script.words
    if found := re.fullmatch(r"sys\.modules\[(.+)\]", row.where):
        return found[1] in words
    module, _, path = row.where.partition(":")
    if found := re.fullmatch(
        r"(\w+)\[(.+)\]", path
    ):  # tables of transformers': of quantizers, and of optimizers by name
        wishes = {"4bit": {"BitsAndBytesConfig", "load_in_4bit"}, "8bit": {"load_in_8bit"}}
        wanted = wishes.get(found[2].rpartition("_")[2], set()) if "QUANTIZER" in found[1] else set()
        wanted_here = wanted & (words | {name for call in script.calls for name in call.keywords})
        return bool(wanted_here) or found[2] in script.strings
    if module.partition(".")[0] == "bitsandbytes" and "bitsandbytes" not in words:
        return False
    names = [name for name in path.split(".") if not name.startswith("__")]
    if len(names) > 1 and names[0].lstrip("_")[0].isupper():
        return names[1] in words and (names[0] in words or names[1] == "push_to_hub")
    return names[-1] in words
