"""A model's tensors under GGUF's names, in llama.cpp's order of rows.

    queries, keys    [heads, 2, d/2] rows become [heads, d/2, 2] where the family is paired
    norms            with what transformers adds to them
    head             left out where it is the embedding, unless llama.cpp asks for it
    experts          one tensor for the same matrix of all experts of a layer

Names are those of the package gguf.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map
from torch import Tensor

from halfbyte.errors import InputError, named
from halfbyte.hf.models.dense import Dense
from halfbyte.hf.models.gguf_form.family import Form

EMBEDDING, HEAD = "token_embd.weight", "output.weight"
PREFIXES = ("model.language_model.", "language_model.model.", "language_model.")
"""How the text part of a model that sees images is called."""
SEEING = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")


EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(\w+\.weight)")


class Entry(NamedTuple):
    """A tensor of the file.

    Attributes:
        name: GGUF's.
        shape: as torch has it; GGUF counts it backwards.
        read: returns it, fp32.
    """

    name: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


def tensors(model: Dense, form: Form) -> list[Entry]:
    """Return what is written of a model, in the file's order.

    Raises:
        InputError: it has a tensor that llama.cpp does not read.
    """
    text = model.config.get_text_config()
    names = Names(form, text)
    targets = {name: planned.target for name, planned in model.tensors.items() if not _is_seen(planned.target)}
    places = {plain_target(target): name for name, target in targets.items()}
    found, strange = {}, []
    for target, matrices in _stacks(places).items():
        gguf = names.of(target)
        if gguf is None:
            strange.append(target)
        else:
            found[gguf] = _stack(model, matrices, gguf)
    for target, name in places.items():
        if EXPERT.fullmatch(target):
            continue
        gguf = names.of(target)
        if gguf is None:
            strange.append(target)
        else:
            found[gguf] = _entry(model, name, gguf, target, names)
    if strange:
        raise InputError(
            f"llama.cpp's {form.arch} has no place for {named(sorted(strange))}; keep the model in the format hf."
        )
    if EMBEDDING not in found:  # one with the head, which is in the files
        found[EMBEDDING] = found.pop(HEAD)._replace(name=EMBEDDING)
    if HEAD in found and form.head == "never":
        raise InputError(
            f"The head of this {form.arch} is another tensor than its embedding, and llama.cpp reads one for both; "
            "keep the model in the format hf."
        )
    if HEAD not in found and form.head == "must":
        found[HEAD] = found[EMBEDDING]._replace(name=HEAD)
    return [found[name] for name in sorted(found, key=_order)]


class Names:
    """GGUF's name of a tensor of transformers', and the order of its rows.

    Args:
        form: of the family.
        text: the configuration of the model that reads text.
    """

    def __init__(self, form: Form, text: Any) -> None:
        arch = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == form.arch)
        self.form, self._heads = form, {"q_proj": text.num_attention_heads, "k_proj": text.num_key_value_heads}
        self._map = get_tensor_name_map(MODEL_ARCH(arch), text.num_hidden_layers)

    def of(self, target: str) -> str | None:
        """Return GGUF's name, or None where llama.cpp reads no such tensor."""
        if target.endswith(".bias") and target.split(".")[-2] not in self.form.biases:
            return None
        found: str | None = self._map.get_name(target, try_suffixes=(".weight", ".bias"))
        return found

    def ordered(self, target: str, x: Tensor) -> Tensor:
        """Return a tensor ``[out, ...]`` with its rows as llama.cpp has them."""
        heads = self._heads.get(target.split(".")[-2]) if self.form.paired else None
        if heads is None:
            return x
        return x.view(heads, 2, -1, *x.shape[1:]).transpose(1, 2).reshape(x.shape)


def _entry(model: Dense, name: str, gguf: str, target: str, names: Names) -> Entry:
    shape = tuple(model.tensors[name].shape)

    def read() -> Tensor:
        x = names.ordered(target, model.read(name).to(torch.float32))
        return x + names.form.offset if target.endswith("norm.weight") else x

    return Entry(gguf, shape, read)


def _stacks(places: Mapping[str, str]) -> dict[str, list[str]]:
    """Return of the matrices of experts, by what they are called without numbers, their names in the order of these."""
    found: dict[str, dict[int, str]] = {}
    for target, name in places.items():
        if expert := EXPERT.fullmatch(target):
            found.setdefault(f"{expert[1]}.{expert[3]}", {})[int(expert[2])] = name
    return {target: [name for _, name in sorted(names.items())] for target, names in found.items()}


def _stack(model: Dense, matrices: list[str], gguf: str) -> Entry:
    shape = (len(matrices), *model.tensors[matrices[0]].shape)
    return Entry(gguf, shape, lambda: torch.stack([model.read(name).to(torch.float32) for name in matrices]))


def plain_target(target: str) -> str:
    """Return a tensor's name as it is in a model that reads text alone."""
    for prefix in PREFIXES:
        if target.startswith(prefix):
            rest = target.removeprefix(prefix)
            return rest if rest.startswith("lm_head.") else f"model.{rest.removeprefix('model.')}"
    return target


def _is_seen(target: str) -> bool:
    return target.startswith(SEEING)


def _order(name: str) -> tuple[int, int, str]:
    """The embedding and what belongs to the whole first, then layer by layer, the head last."""
    parts = name.split(".")
    if parts[0] == "blk":
        return (1, int(parts[1]), name)
    return (2 if name == HEAD else 0, 0, name)


def seen(model: Dense) -> Iterator[str]:
    """Yield the tensors of a model's part that sees images, which is left out."""
    yield from (planned.target for planned in model.tensors.values() if _is_seen(planned.target))
