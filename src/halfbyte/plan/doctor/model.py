"""A model's folder, file or hub id: whether it is whole, fits itself, can be trained, and how it will run here.

    files, values    what ``halfbyte verify`` finds, and more of each tensor in the same pass (:mod:`.weights`)
    configuration    can be read, names a class that transformers has
    tokenizer        :mod:`.tokenizer`
    layers           which decoder layers are fused, how attention runs, what share is held in 4 bits
    size             against memory and disk
    adapter          its base, and whether it learnt anything

One tensor is in memory at a time. A model that is not on this machine is not downloaded: what the hub tells of it is
all that is told then.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from halfbyte import devices
from halfbyte.errors import InputError, counted, size_text
from halfbyte.hf import HalfbyteConfig, HalfbyteQuantizer, share_quantized
from halfbyte.hf.layers.attention_choice import choose_attention, describe_attention
from halfbyte.hf.layers.fusion import foretell_layers
from halfbyte.hf.models.checkpoint import weight_files
from halfbyte.hf.models.configs import ADAPTER, CONFIG, config_at, json_of
from halfbyte.hf.models.foreign.packed import packing_of
from halfbyte.hf.models.hub import Place, locate
from halfbyte.hf.models.linears import largest_dense
from halfbyte.hf.models.quantize_files import skeleton_of
from halfbyte.hf.models.verify import Finding as Damage
from halfbyte.hf.models.verify import verify
from halfbyte.memory import free_memory
from halfbyte.plan.doctor import tokenizer as words
from halfbyte.plan.doctor.finding import Finding, looked, told
from halfbyte.plan.doctor.hub_model import examine_id
from halfbyte.plan.doctor.weights import Weights, sentence_of
from halfbyte.runs.circumstances import folder_of

SHOWN = 8
"""Damaged tensors that are told one by one."""
TIGHT = 0.8
"""Share of the free memory beyond which a base leaves little for a step."""


@dataclass
class _Opened:
    """What of a model could be read.

    Attributes:
        path: as the user says it.
        place: its files.
        config: its configuration, or None.
        skeleton: the model without memory, or None.
        tokenizer: its tokenizer, or None.
    """

    path: str
    place: Place
    config: Any = None
    skeleton: Any = None
    tokenizer: Any = None

    @property
    def folder(self) -> Path:
        return Path(self.place.path)


def examine(
    path: str, *, progress: Callable[[int, int], None] = lambda *_: None, trust_remote_code: bool = False
) -> list[Finding]:
    """Look at a model or an adapter.

    Args:
        path: a folder, a GGUF file, or a hub id.
        progress: called with tensors read and tensors in all.
        trust_remote_code: run code that comes with the model.

    Raises:
        InputError: there is no such model.
    """
    here = folder_of(path)
    if not here.exists():
        return examine_id(path)
    model = _Opened(str(here), locate(here))
    if (model.folder / ADAPTER).is_file():
        return _adapter(model, progress)
    if not model.place.gguf and not (model.folder / CONFIG).is_file():
        raise InputError(
            f"{path} is neither a model (config.json), an adapter (adapter_config.json), a run nor a script."
        )
    findings = _configuration(model, trust_remote_code)
    about = _about(model)
    model.tokenizer = words.opened(about, trust_remote_code, findings)
    if model.tokenizer is not None:
        findings += words.check(model.tokenizer, about)
    findings += looked("generation", lambda: _generation(model))
    findings += _weights(model, progress, trust_remote_code)
    if model.skeleton is not None:
        findings += looked("decoder layers", lambda: _layers(model))
        findings += looked("attention", lambda: _attention(model))
        findings += looked("size", lambda: _size(model))
    return findings


def _configuration(model: _Opened, trust_remote_code: bool) -> list[Finding]:
    why = "Without it nobody knows what the weights are of."
    try:
        model.config = config_at(model.place, trust_remote_code)
    except InputError as error:
        return [Finding("configuration", str(error), why, "Copy config.json from the model's source.", "fault")]
    except Exception as error:  # transformers raises what its parts raise
        return [Finding("configuration", told(error), why, "Copy config.json from the model's source.", "fault")]
    held = getattr(model.config, "quantization_config", None)
    plain = _without_quantization(model.config)
    try:
        model.skeleton = skeleton_of(plain, torch.bfloat16, trust_remote_code)
    except Exception as error:
        value = f"{model.config.model_type}: the model cannot be built: {told(error)}"
        return [Finding("configuration", value, why, "pip install 'transformers>=5.23,<5.24'", "fault")]
    parameters = sum(parameter.numel() for parameter in model.skeleton.parameters())
    text = model.config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    method = (held if isinstance(held, dict) else held.to_dict()).get("quant_method") if held is not None else None
    parts = [type(model.skeleton).__name__, f"{parameters:,} parameters"]
    parts += [f"held by {method} already"] if method else []
    parts += [f"{positions:,} positions"] if positions else []
    return [Finding("configuration", ", ".join(parts))]


def _without_quantization(config: Any) -> Any:
    """Return the configuration of the same model in 16 bits."""
    plain = type(config).from_dict(config.to_dict())
    plain.__dict__.pop("quantization_config", None)
    return plain


def _about(model: _Opened) -> words.About:
    eos: Any = getattr(model.config, "eos_token_id", None) if model.config is not None else None
    embedding = model.skeleton.get_input_embeddings() if model.skeleton is not None else None
    weight = getattr(embedding, "weight", None)
    own = str(model.place.gguf) if model.place.gguf else model.path
    return words.About(
        path=own,
        folder=model.folder,
        rows=len(weight) if weight is not None else None,
        ends=_ids(_generation_config(model)),
        eos=_ids(eos),
        is_chat=model.skeleton is not None and model.skeleton.can_generate(),
    )


def _generation_config(model: _Opened) -> Any:
    try:
        return GenerationConfig.from_pretrained(str(model.folder)).eos_token_id
    except Exception:  # there is none, or it is damaged, which is told elsewhere
        return None


def _ids(given: Any) -> tuple[int, ...]:
    """Return the numbers of tokens that a setting names; what are none are told by :func:`_generation`."""
    return tuple(one for one in (given if isinstance(given, list) else [given]) if type(one) is int)


def _generation(model: _Opened) -> Iterator[Finding]:
    file = model.folder / "generation_config.json"
    if not file.is_file():
        return
    try:
        named = json_of(file).get("eos_token_id")
        GenerationConfig.from_pretrained(str(model.folder))
        if odd := [
            one for one in (named if isinstance(named, list) else [named]) if type(one) not in (int, type(None))
        ]:
            raise InputError(f"eos_token_id names {odd[0]!r}, which is no number of a token.")
    except Exception as error:
        yield Finding(
            "generation",
            f"{file.name} cannot be used: {told(error)}",
            "Saving or merging this model ends with that error, after training.",
            f"Mend {file}, or copy it from the model's source.",
            "warning",
        )


def _weights(model: _Opened, progress: Callable[[int, int], None], trust_remote_code: bool) -> list[Finding]:
    tokens = words.stops_of(model.tokenizer) if model.tokenizer is not None else {}
    seen = Weights(tokens=tokens) if model.skeleton is None else _weights_of(model.skeleton, tokens)
    findings: list[Finding] = []
    try:
        files = (
            [] if model.place.gguf else weight_files(model.folder, getattr(model.config, "transformers_weights", None))
        )
        findings += looked("shards", lambda: _twice(files))
        path = model.place.gguf or model.place.path
        found = verify(path, progress=progress, seen=seen, trust_remote_code=trust_remote_code)
    except Exception as error:  # a configuration that transformers cannot build from raises what its parts raise
        why = "Without whole weights the model cannot be opened."
        value = str(error) if isinstance(error, InputError) else f"could not be held against config.json: {told(error)}"
        return [
            *findings,
            Finding("weights", value, why, "Copy the files from the model's source again.", "fault"),
        ]
    findings += _of_verify(found.findings)
    if not found.faults:
        whole = f"{counted(found.tensors, 'tensor')} in {counted(found.files, 'file')} of {size_text(found.nbytes)}"
        findings.append(Finding("weights", f"{whole}: no fault"))
    findings += looked("values", seen.findings)
    return findings if found.faults else [*findings, *looked("tied weights", lambda: _ties(model, files))]


def _of_verify(seen: Sequence[Damage]) -> Iterator[Finding]:
    """Yield what ``halfbyte verify`` has found, as long as the list is not too long to read."""
    faults, hazards = ([sentence_of(one) for one in seen if one.is_fault == is_fault] for is_fault in (True, False))
    why = "The model is damaged: it cannot be opened, or what it computes is wrong."
    fix = "Copy the damaged files from their source again, or make them anew."
    for value in faults[:SHOWN]:
        yield Finding("weights", value, why, fix, "fault")
    if len(faults) > SHOWN:
        value = f"and {len(faults) - SHOWN:,} more, which halfbyte verify lists"
        yield Finding("weights", value, why, fix, "fault")
    if hazards:
        more = f" And {len(hazards) - 1:,} more, which halfbyte verify lists." if len(hazards) > 1 else ""
        yield Finding("weights", hazards[0] + more, "It is right here, and may be wrong elsewhere.", "", "note")


def _weights_of(skeleton: Any, tokens: dict[int, str]) -> Weights:
    """Return what sees the tensors of a model."""
    ids = {id(skeleton.get_input_embeddings()), id(skeleton.get_output_embeddings())}
    modules = list(skeleton.named_modules())
    ties = skeleton.all_tied_weights_keys
    return Weights(
        embeddings={f"{name}.weight" for name, module in modules if id(module) in ids},
        tokens=tokens,
        tied={*ties, *ties.values()},
        looked_up={
            f"{name}.weight" for name, module in modules if id(module) in ids or isinstance(module, nn.Embedding)
        },
    )


def _twice(files: list[Path]) -> Iterator[Finding]:
    """Yield tensors that several files hold."""
    from safetensors import safe_open

    homes: dict[str, list[Path]] = {}
    for file in files:
        if file.suffix == ".safetensors":
            try:
                with safe_open(file, framework="pt") as tensors:
                    for name in list(tensors.keys()):
                        homes.setdefault(name, []).append(file)
            except Exception:  # damaged, which is told of the weights
                continue
    for name, several in homes.items():
        if len(several) > 1:
            same = all(torch.equal(_read(several[0], name), _read(file, name)) for file in several[1:])
            yield Finding(
                "shards",
                f"{name} is in {' and '.join(file.name for file in several)}, "
                + ("with the same values" if same else "with other values"),
                "It takes its place twice." if same else "Which of them counts depends on who reads the folder.",
                "Copy the model from its source again.",
                "note" if same else "fault",
            )


def _read(file: Path, name: str) -> Tensor:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as tensors:
        tensor: Tensor = tensors.get_tensor(name)
        return tensor


def _ties(model: _Opened, files: list[Path]) -> Iterator[Finding]:
    """Yield weights that are said to be one, and are stored twice with other values."""
    if model.skeleton is None or not files or any(file.suffix != ".safetensors" for file in files):
        return
    from halfbyte.hf.models.checkpoint import Checkpoint

    held = Checkpoint(files)
    for target, source in model.skeleton.all_tied_weights_keys.items():
        if {target, source} <= set(held.names) and not torch.equal(held.read(target), held.read(source)):
            yield Finding(
                "tied weights",
                f"{target} and {source} are one by config.json (tie_word_embeddings), and hold other values",
                "Who ties them answers with one of the two alone; a head that was trained apart is lost.",
                'Set "tie_word_embeddings": false in config.json, if the head is its own.',
                "warning",
            )


def _layers(model: _Opened) -> Iterator[Finding]:
    found = foretell_layers(model.skeleton)
    if not found:
        yield Finding("decoder layers", "there are none of transformers' kind: everything runs as transformers has it")
    for name, count, obstacle in found:
        if not obstacle:
            yield Finding("decoder layers", f"{count} {name}: fused")
            continue
        yield Finding(
            "decoder layers",
            f"{count} {name} {obstacle}",
            "They train and answer as transformers writes them: right, and slower. Their linear layers are in 4 bits "
            "all the same.",
            "",
            "note",
        )


def _attention(model: _Opened) -> Iterator[Finding]:
    choose_attention(model.skeleton)
    yield Finding("attention", describe_attention(model.skeleton, devices.choose("auto").type))


def _size(model: _Opened) -> Iterator[Finding]:
    """Yield what share of the weights 4 bits hold, and whether there is memory for them."""
    held = getattr(model.config, "quantization_config", None)
    if held is not None and not packing_of(model.config):
        return
    values = sum(parameter.numel() for parameter in model.skeleton.parameters())
    HalfbyteQuantizer(HalfbyteConfig(), pre_quantized=False).preprocess_model(model.skeleton)
    share = share_quantized(model.skeleton)
    needed = int(values * share * 4.127 / 8 + values * (1 - share) * 2)
    free = free_memory()
    value = f"{share:.0%} of {values:,} values in 4 bits: {size_text(needed)}, of {size_text(free)} free"
    if share < 0.5:
        yield Finding(
            "in 4 bits",
            f"{value}; {largest_dense(model.skeleton)} is the largest of the others",
            "What is no linear layer, and what puts its layers together otherwise, stays in 16 bits.",
            "",
            "note",
        )
    elif needed > TIGHT * free:
        yield Finding(
            "in 4 bits",
            value,
            "There is little or no room beside the base for a training step: the base is then paged from the disk, at "
            "its speed.",
            f"halfbyte quantize {model.path} MODEL-4bit  # then train over that folder, whose pages are only read",
            "warning",
        )
    else:
        yield Finding("in 4 bits", value)


def _adapter(model: _Opened, progress: Callable[[int, int], None]) -> list[Finding]:
    from halfbyte.plan.doctor.adapter import examine as adapter

    return adapter(model.folder, progress)
