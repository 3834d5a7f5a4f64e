"""A model's tensors under GGUF's names, in llama.cpp's order of rows (:mod:`halfbyte.hf.models.gguf_form.names`).

norms            with what transformers adds to them
head             left out where it is the embedding, unless llama.cpp asks for it
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from halfbyte.errors import InputError, named
from halfbyte.hf.models.gguf_form.family import Form
from halfbyte.hf.models.gguf_form.names import EXPERT, Names, plain_target

EMBEDDING, HEAD = "token_embd.weight", "output.weight"
SEEING = (
    "vision_tower.",
    "vision_model.",
    "multi_modal_projector.",
    "model.vision_tower.",
    "model.multi_modal_projector.",
)


class Source(Protocol):
    """What is written: as :class:`halfbyte.hf.models.dense.Dense`, as far as it is asked here."""

    config: Any

    @property
    def tensors(self) -> Mapping[str, Any]:
        """By its name in the files, which tensor of the model each is (``target``), and its ``shape``."""

    def read(self, name: str) -> Tensor:
        """Return the tensor ``name``."""


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


def tensors(model: Source, form: Form) -> list[Entry]:
    """Return what is written of a model, in the file's order.

    Raises:
        InputError: it has a tensor that llama.cpp does not read.
    """
    names = Names(form, model.config.get_text_config())
    targets = {name: planned.target for name, planned in model.tensors.items() if not _is_seen(planned.target)}
    places = {plain_target(target): name for name, target in targets.items()}
    found: dict[str, Entry] = {}
    strange = []
    for target, held in _stacks(places).items():
        parts = names.parts(target)
        if parts is None:
            strange.append(target)
        else:
            found |= {part: _entry(model, held, part, i, target, names) for i, part in enumerate(parts)}
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


def _stacks(places: Mapping[str, str]) -> dict[str, str | list[str]]:
    """Return names in the files by those in the model: of matrices of experts, by what they are called without numbers,
    all of them in the order of these."""
    found: dict[str, str | list[str]] = {}
    experts: dict[str, dict[int, str]] = {}
    for target, name in places.items():
        if expert := EXPERT.fullmatch(target):
            experts.setdefault(f"{expert[1]}.{expert[3]}", {})[int(expert[2])] = name
        else:
            found[target] = name
    return found | {target: [name for _, name in sorted(held.items())] for target, held in experts.items()}


def _entry(model: Source, held: str | list[str], gguf: str, part: int, target: str, names: Names) -> Entry:
    def piece(x: Tensor) -> Tensor:
        return names.apart(target, x)[part]

    def shape(name: str) -> tuple[int, ...]:
        return tuple(piece(torch.empty(model.tensors[name].shape, device="meta")).shape)

    def one(name: str) -> Tensor:
        x = piece(model.read(name).to(torch.float32))
        return x + names.form.offset if target.endswith("norm.weight") else x

    if isinstance(held, str):
        return Entry(gguf, shape(held), lambda: one(held))
    return Entry(gguf, (len(held), *shape(held[0])), lambda: torch.stack([one(name) for name in held]))


def _is_seen(target: str) -> bool:
    return target.startswith(SEEING)


def _order(name: str) -> tuple[int, int, str]:
    """The embedding and what belongs to the whole first, then layer by layer, the head last."""
    parts = name.split(".")
    if parts[0] == "blk":
        return (1, int(parts[1]), name)
    return (2 if name == HEAD else 0, 0, name)


def seen(model: Source) -> Iterator[str]:
    """Yield the tensors of a model's part that sees images, which is left out."""
    yield from (planned.target for planned in model.tensors.values() if _is_seen(planned.target))
