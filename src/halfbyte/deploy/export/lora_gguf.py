"""Write an adapter alone as GGUF: llama.cpp adds it to its base when it opens the two (``--lora``).

    <tensor of the base>.lora_a    A: [rank, in]
    <tensor of the base>.lora_b    B: [out, rank]

llama.cpp's scale is ``adapter.lora.alpha`` over the rank. The file's is the adapter's own for most modules; where PEFT
has another one (rsLoRA, patterns of ranks and alphas), what is between them is within B. Rows of B are in llama.cpp's
order, as those of the weight. The base is the file that :func:`halfbyte.deploy.export.gguf.export_gguf` makes of the
base model, in any type.
"""

import shlex
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor

from halfbyte.choices import GgufAdapterType
from halfbyte.deploy.card import write_card
from halfbyte.deploy.export.ggml import HALF, kind_of, packed, packed_bytes
from halfbyte.deploy.export.gguf import FILES, HEADER
from halfbyte.deploy.folders import check_apart, free_folder
from halfbyte.errors import InputError, check_room, named
from halfbyte.files import whole_folder
from halfbyte.hf.models.base_files import Source, check_base
from halfbyte.hf.models.configs import config_at, model_class
from halfbyte.hf.models.gguf_form.family import form_of
from halfbyte.hf.models.gguf_form.names import Names, plain_target
from halfbyte.hf.models.gguf_form.tensors import HEAD
from halfbyte.hf.models.hub import Place, locate
from halfbyte.hf.models.loader import base_of_adapter
from halfbyte.hf.models.low_rank import LowRankAdapter, Part, read_low_rank
from halfbyte.hf.models.quantize_files import on_disk, skeleton_of

OF_BASE = ".base_layer.weight"
"""What PEFT writes beside an adapter of the embedding or the head: the base's own."""
TAKEN_OUT = ("pissa", "olora", "corda")
"""Beginnings of PEFT's that change the base."""
USE = """\
With llama.cpp, over the base model as GGUF:

```sh
llama-cli -m BASE.gguf --lora {file} --jinja
```

With Ollama, in a Modelfile:

```
FROM ./BASE.gguf
ADAPTER ./{file}
```"""


@dataclass(frozen=True)
class GgufAdapter:
    """What was written.

    Attributes:
        folder: where.
        file: the GGUF file in it.
        modules: that it changes.
        values: of A and B.
        nbytes: of the file.
    """

    folder: Path
    file: Path
    modules: int
    values: int
    nbytes: int


def export_lora_gguf(
    adapter: str | Path,
    output: str | Path,
    *,
    to: GgufAdapterType = "f32",
    base: str | Path | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> GgufAdapter:
    """Write a LoRA adapter to the folder ``output``, which appears whole: ``NAME-lora-TO.gguf`` and a card.

    Args:
        adapter: folder of a run or of a PEFT adapter, or a hub id.
        output: the new folder; its name is the adapter's.
        to: what its matrices are in.
        base: another place for the base than the adapter names; its configuration alone is read.
        overwrite: replace an export that is there already.
        trust_remote_code: run code that comes with the base model.

    Raises:
        InputError: there is no such adapter or base, llama.cpp does not compute the base's family, the adapter is more
            than what LoRA adds to matrices, a value is too large, the folder is in use, or the disk has no room.
    """
    output = free_folder(output, overwrite, FILES)
    read = read_low_rank(adapter)
    place = base_of_adapter(locate(adapter)) if base is None else locate(base)
    config = config_at(place, trust_remote_code)
    _check_kind(read, adapter, config.get_text_config().vocab_size)
    check_apart(output, [read.folder, *([Path(place.path)] if place.is_folder else [])])
    check_base(read.folder, Source(place, trust_remote_code))
    form = form_of(config, model_class(config).__name__)
    _check_shapes(read, adapter, config, trust_remote_code)
    names = Names(form, config.get_text_config())
    tied = config.get_text_config().tie_word_embeddings
    parts = {_target(name, names, tied): (name, part) for name, part in read.parts.items()}
    alpha, matrices = _matrices(parts, names)
    check_room(output, sum(packed_bytes(x.shape, to) for x in matrices.values()) + HEADER, "The adapter")
    with whole_folder(output) as folder:
        told = output.name if "lora" in output.name.lower() else f"{output.name}-lora"
        file = folder / f"{told}-{to}.gguf"
        writer = gguf.GGUFWriter(file, form.arch)
        try:
            writer.add_type("adapter")
            writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
            writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
            writer.add_name(output.name)
            for name, x in matrices.items():
                if to == "f16" and float(x.abs().amax()) > HALF:
                    raise InputError(f"{name} has values beyond fp16's {HALF:.0f}; export bf16 or f32.")
                writer.add_tensor(name, packed(x, to), raw_dtype=kind_of(to))
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
        _card(folder, read, place, file.name, to)
        nbytes = file.stat().st_size
    values = sum(x.numel() for x in matrices.values())
    return GgufAdapter(output, output / file.name, len(parts), values, nbytes)


def _check_kind(read: LowRankAdapter, adapter: str | Path, rows: int) -> None:
    merged = "export the merged model (--format gguf)"
    if read.stacks:
        name, stack = next(iter(read.stacks.items()))
        raise InputError(
            f"{adapter} is on experts ({name}, {stack.experts} of {list(read.parts[stack.members[0]].shape)}), which "
            f"is not written as an adapter of llama.cpp's; {merged}."
        )
    if read.is_dora:
        raise InputError(
            f"{adapter} is DoRA, which GGUF has no words for; halfbyte adapter convert makes plain LoRA of it, or "
            f"{merged}."
        )
    start = read.config.init_lora_weights
    if isinstance(start, str) and start.startswith(TAKEN_OUT):
        raise InputError(
            f"{adapter} began with {start}, which PEFT took out of its base; halfbyte adapter convert makes plain LoRA "
            f"of it, or {merged}."
        )
    embeddings = [name for name, part in read.parts.items() if part.is_embedding]
    if embeddings:
        raise InputError(
            f"{adapter} changes the embedding ({named(embeddings)}), which is not written as an adapter of llama.cpp's;"
            f" {merged}."
        )
    more = [name for name, x in read.others.items() if not (name.endswith(OF_BASE) and len(x) == rows)]
    if more:
        raise InputError(
            f"{adapter} has more than what LoRA adds to matrices ({named(sorted(more))}: biases, modules that were "
            f"saved whole or new tokens), which GGUF has no words for; {merged}."
        )


def _check_shapes(read: LowRankAdapter, adapter: str | Path, config: Any, trust_remote_code: bool) -> None:
    weights = skeleton_of(config, torch.bfloat16, trust_remote_code).state_dict()
    for name, part in read.parts.items():
        shape, wanted = part.shape, tuple(getattr(weights.get(f"{name}.weight"), "shape", ()))
        if wanted and shape != wanted:
            raise InputError(
                f"{adapter} and its base do not fit: {name} is {list(wanted)} in the model, and what the adapter adds "
                f"is {list(shape)}."
            )


def _target(module: str, names: Names, tied: bool) -> str:
    target = plain_target(f"{module}.weight")
    found = names.of(target)
    if found is None or (found == HEAD and (tied or names.form.head == "never")):
        raise InputError(
            f"llama.cpp's {names.form.arch} has no matrix of its own for {module}; export the merged model (--format "
            "gguf)."
        )
    return found


def _matrices(parts: Mapping[str, tuple[str, Part]], names: Names) -> tuple[float, dict[str, Tensor]]:
    """Return the file's alpha and its tensors.

    llama.cpp multiplies by alpha / rank; of what the modules' own alphas are, the file has the one that most have.
    """
    alphas = Counter(part.scaling * part.rank for _, part in parts.values() if part.scaling)
    alpha = alphas.most_common(1)[0][0] if alphas else 1.0  # of 0 llama.cpp would make 1
    found = {}
    for target, (module, part) in parts.items():
        b = names.ordered(plain_target(f"{module}.weight"), part.b)
        rest = part.scaling * part.rank / alpha
        found[f"{target}.lora_a"] = part.a
        found[f"{target}.lora_b"] = b if rest == 1.0 else b * rest
    return alpha, found


def _card(folder: Path, read: LowRankAdapter, place: Place, file: str, to: str) -> None:
    source = on_disk(place)
    form = f"a LoRA adapter for it, as GGUF in {to}"
    write_card(
        folder, read.folder, place, source, form, use=USE.format(file=shlex.quote(file)), library="gguf", tags=("gguf",)
    )
