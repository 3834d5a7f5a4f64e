"""Write a run's model as GGUF, for llama.cpp and what stands on it, with a Modelfile for Ollama and a card.

Tensor by tensor: in memory are the adapter and the tensor that is being made. What a tensor is written in follows
llama.cpp's convention:

    norms, biases, other vectors      f32
    a mixture's router                f32
    matrices                          the type that is asked for
    the head, or the embedding where it is the head's too: q8_0 where codes of 4 or 5 bits are asked for (llama.cpp has
                                      q6_k there, and q8_0 where a row is no multiple of 256)
    a matrix whose rows are no whole blocks of 32: f16

k-quants are made of an f16 file by llama.cpp itself (:mod:`halfbyte.deploy.export.llama_library`).
"""

import shlex
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from halfbyte.choices import GgufType, Onto
from halfbyte.deploy.card import licence_of, write_card
from halfbyte.deploy.export import llama_library
from halfbyte.deploy.export.ggml import BLOCK, CODES, FLOATS, HALF, kind_of, packed, packed_bytes, packed_shape
from halfbyte.deploy.export.modelfile import modelfile
from halfbyte.deploy.folders import check_apart, free_folder
from halfbyte.deploy.merge import form_of as merged_form
from halfbyte.errors import InputError, check_room
from halfbyte.files import whole_folder
from halfbyte.hf.models.dense import Dense, dense_model, sources, tokenizer_of
from halfbyte.hf.models.gguf_form.family import Form, form_of, metadata, notes_of
from halfbyte.hf.models.gguf_form.mixtures import say_experts
from halfbyte.hf.models.gguf_form.positions import positions
from halfbyte.hf.models.gguf_form.tensors import EMBEDDING, HEAD, Entry, seen, tensors
from halfbyte.hf.models.gguf_form.words import Words, words_of

FILES = "*.gguf"
"""What tells an export's folder from others."""
ROUTER = ".ffn_gate_inp"
HEADER, WORD = 1 << 20, 64
"""Bytes, about, of all beside the tensors: of the file, and of a token with its merges."""
USE = """\
With llama.cpp:

```sh
llama-cli -m {file} --jinja
llama-server -m {file} --jinja
```

With Ollama, in this folder:

```sh
ollama create {name} -f Modelfile
ollama run {name}
```"""


@dataclass(frozen=True)
class GgufCopy:
    """What was written.

    Attributes:
        folder: where.
        file: the GGUF file in it.
        values: of all tensors.
        nbytes: of the file.
        kinds: how many tensors are in which format.
        is_quantized: whether the weights that the file was made of are those of 4 or 8 bits.
        notes: sentences on what llama.cpp will do otherwise than the model.
    """

    folder: Path
    file: Path
    values: int
    nbytes: int
    kinds: dict[str, int]
    is_quantized: bool
    notes: list[str] = field(default_factory=list)


def export_gguf(
    run: str | Path,
    output: str | Path,
    *,
    to: GgufType = "q8_0",
    onto: Onto = "quantized",
    base: str | Path | None = None,
    pre: str | None = None,
    progress: Callable[[int, int], None] | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> GgufCopy:
    """Write a model to the folder ``output``, which appears whole: ``NAME-TO.gguf``, a Modelfile and a card.

    Args:
        run: folder of a run, of a PEFT adapter or of a model; a GGUF file; or a hub id.
        output: the new folder; its name is the model's.
        to: what matrices are in.
        onto: of an adapter, which weights of its base it is added to.
        base: of an adapter, another place for the base than it names.
        pre: llama.cpp's name for how the tokenizer cuts texts, where that is not recognised.
        progress: called with tensors done and tensors in all.
        overwrite: replace an export that is there already.
        trust_remote_code: run code that comes with the model.

    Raises:
        InputError: there is no such model, llama.cpp does not compute its family, its tokenizer is of another kind or
            does not fit it, a value is not finite or too large, the folder is in use, or the disk has no room.
    """
    output = free_folder(output, overwrite, FILES)
    own = to in CODES or to in FLOATS
    if not own:
        llama_library.check_quantizer(to)
    model = dense_model(run, onto, torch.float32, base=base, trust_remote_code=trust_remote_code)
    check_apart(output, sources(model))
    form = form_of(model.config, model.architecture)
    entries = tensors(model, form)
    rows = next(entry.shape[0] for entry in entries if entry.name == EMBEDDING)
    tokenizer = tokenizer_of(model, trust_remote_code=trust_remote_code)
    generation = _generation(model)
    stops = _stops(tokenizer, generation)
    words = words_of(tokenizer, rows, stops, pre)
    kinds = formats(entries, to if own else "f16")
    needed = sum(packed_bytes(entry.shape, kinds[entry.name]) for entry in entries) + HEADER + WORD * rows
    check_room(output, needed if own else 2 * needed, "The exported model")
    notes = [*notes_of(model.config, form), *words.notes, *_left_out(model), *_fallen_back(kinds, entries, to)]
    with whole_folder(output) as folder:
        name = output.name
        file = folder / f"{name}-{to}.gguf"
        made = file if own else folder / f"{name}-f16.gguf"
        writer = _writer(made, model, form, words, rows, to if own else "f16", generation, name)
        _write(writer, form, model, entries, kinds, progress)
        if not own:
            llama_library.quantize(made, file, to, torch.get_num_threads())
            made.unlink()
        text = modelfile(file.name, tokenizer, stops, generation, words.flags["add_bos_token"])
        (folder / "Modelfile").write_text(text, encoding="utf-8")
        use = USE.format(file=shlex.quote(file.name), name=shlex.quote(name))
        write_card(
            folder, model.adapter, model.base.named, model.base.folder, _made_of(model, to),
            use="\n\n".join([use, *notes]), library="gguf", quantized=to not in FLOATS, tags=("gguf",),
        )  # fmt: skip
        nbytes = file.stat().st_size
    final = output / f"{name}-{to}.gguf"
    held = kinds if own else {x.name: x.tensor_type.name.lower() for x in gguf.GGUFReader(final).tensors}
    return GgufCopy(
        output, final, model.values, nbytes, dict(Counter(held.values())), model.base.is_quantized, notes
    )  # fmt: skip


def formats(entries: Sequence[Entry], to: str) -> dict[str, str]:
    """Return what each tensor is written in; see the head of this file."""
    heads = {HEAD if any(entry.name == HEAD for entry in entries) else EMBEDDING}
    found = {}
    for entry in entries:
        plain = len(entry.shape) == 1 or ROUTER in entry.name or entry.name.endswith(".bias")
        kind = "f32" if plain else to
        if entry.name in heads and kind in CODES:
            kind = "q8_0"
        if kind in CODES and entry.shape[-1] % BLOCK:
            kind = "f16"
        found[entry.name] = kind
    return found


def _writer(
    file: Path, model: Dense, form: Form, words: Words, rows: int, to: str, generation: Any, name: str
) -> gguf.GGUFWriter:
    writer = gguf.GGUFWriter(file, form.arch)
    writer.add_type("model")
    if words.may_be_called(name):
        writer.add_name(name)
    if (licence := licence_of(model.base.folder)) is not None:
        writer.add_license(licence)
    writer.add_tags(["halfbyte", "qlora"])
    writer.add_file_type(_file_type(to))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    metadata(writer, model.config, form, rows)
    say_experts(writer, model.config, form)
    words.write(writer)
    given = generation.to_diff_dict() if generation is not None else {}
    for key, add in (
        ("top_k", writer.add_sampling_top_k), ("top_p", writer.add_sampling_top_p),
        ("min_p", writer.add_sampling_min_p), ("temperature", writer.add_sampling_temp),
        ("repetition_penalty", writer.add_sampling_penalty_repeat),
    ):  # fmt: skip
        if isinstance(given.get(key), int | float):
            add(given[key])
    return writer


def _write(
    writer: gguf.GGUFWriter,
    form: Form,
    model: Dense,
    entries: Sequence[Entry],
    kinds: dict[str, str],
    progress: Callable[[int, int], None] | None,
) -> None:
    extra = positions(writer, model.config, form)
    try:
        for name, x in extra.items():
            _announce(writer, name, tuple(x.shape), "f32")
        for entry in entries:
            _announce(writer, entry.name, entry.shape, kinds[entry.name])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for x in extra.values():
            writer.write_tensor_data(x.numpy())
        for done, entry in enumerate(entries, 1):
            x = entry.read()
            kind = kinds[entry.name]
            if kind not in ("f32", "bf16") and max(abs(float(end)) for end in x.aminmax()) > HALF:
                raise InputError(f"{entry.name} has values beyond fp16's {HALF:.0f}; export bf16 or f32.")
            writer.write_tensor_data(packed(x, kind))
            if progress:
                progress(done, len(entries))
    finally:
        writer.close()


def _announce(writer: gguf.GGUFWriter, name: str, shape: tuple[int, ...], kind: str) -> None:
    held = torch.empty(0, dtype=torch.float16 if kind == "f16" else torch.float32 if kind == "f32" else torch.uint8)
    writer.add_tensor_info(
        name, packed_shape(shape, kind), held.numpy().dtype, packed_bytes(shape, kind), raw_dtype=kind_of(kind)
    )


def _file_type(to: str) -> int:
    names = {"f32": "ALL_F32"}
    return int(gguf.LlamaFileType[names.get(to, f"MOSTLY_{to.upper()}")])


def _generation(model: Dense) -> GenerationConfig | None:
    for folder in sources(model):
        if (folder / "generation_config.json").is_file():
            try:
                return GenerationConfig.from_pretrained(folder)
            except (ValueError, OSError) as error:
                raise InputError(f"{folder / 'generation_config.json'} cannot be read: {error}") from error
    return None


def _stops(tokenizer: PreTrainedTokenizerBase, generation: GenerationConfig | None) -> list[int]:
    """Return the tokens that end an answer: those of the generation settings, and the tokenizer's own last."""
    given = generation.eos_token_id if generation is not None else None
    ends = [given] if isinstance(given, int) else [*(given or ())]
    if tokenizer.eos_token_id is not None and not ends:
        ends.append(tokenizer.eos_token_id)
    return [end for end in dict.fromkeys(ends) if isinstance(tokenizer.convert_ids_to_tokens(end), str)]


def _left_out(model: Dense) -> list[str]:
    if any(True for _ in seen(model)):
        return ["The part of the model that sees images is left out: the file reads text."]
    return []


def _fallen_back(kinds: dict[str, str], entries: Sequence[Entry], to: str) -> list[str]:
    odd = [entry.name for entry in entries if to in CODES and kinds[entry.name] == "f16"]
    if not odd:
        return []
    return [f"{len(odd)} of the matrices are in f16, since their rows are no whole blocks of {BLOCK} ({odd[0]})."]


def _made_of(model: Dense, to: str) -> str:
    if model.adapter is None:
        return f"as GGUF, in {to}"
    return f"{merged_form(model)}, as GGUF in {to}"
