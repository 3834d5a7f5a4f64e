"""What tensors of transformers' are called in GGUF, and how llama.cpp has their rows; both ways.

    queries, keys           [heads, 2, d/2] rows become [heads, d/2, 2] where the family is paired
    experts                 one tensor for the same matrix of all experts of a layer
    gpt-oss's experts       rows of gate and up, which alternate, in two tensors
    Granite's shared one    its gate and its up, one above the other, in two tensors
    Qwen 2's shared gate    a matrix of one row: a vector
    DeepSeek's kv_b_proj    of each head, what makes keys (transposed: queries are multiplied by it) and values

Names are those of the package gguf (0.19).
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map
from torch import Tensor

from halfbyte.hf.models.gguf_form.family import Form

PREFIXES = ("model.language_model.", "language_model.model.", "language_model.")
"""How the text part of a model that sees images is called."""
EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(\w+\.(?:weight|bias))")
RENAMED = (
    ("block_sparse_moe.router.", "block_sparse_moe.router.layer."),
    ("block_sparse_moe.experts.", "mlp.experts."),
    ("e_score_correction_bias", "e_score_correction.bias"),
)
"""What transformers (5.23) calls otherwise than the checkpoints that gguf's names are of."""
SUFFIXED = ("sinks",)
"""Parameters of no layer, which are called weights in GGUF."""


class Cut(NamedTuple):
    """A matrix that is several tensors in GGUF, or one of another shape.

    Attributes:
        layer: its name.
        pieces: what stands for that in the names of the pieces.
        apart: makes them of it.
        together: makes it of them.
    """

    layer: str
    pieces: tuple[str, ...]
    apart: Callable[[Any, Tensor], Sequence[Tensor]]
    together: Callable[[Any, Sequence[Tensor]], Tensor]


def _keys_and_values(text: Any, x: Tensor) -> Sequence[Tensor]:
    heads = x.view(text.num_attention_heads, -1, x.shape[-1])
    keys, values = torch.split(heads, [text.qk_nope_head_dim, text.v_head_dim], 1)
    return keys.transpose(1, 2), values


def _heads(text: Any, pieces: Sequence[Tensor]) -> Tensor:
    keys, values = pieces
    return torch.cat([keys.transpose(1, 2), values], 1).flatten(0, 1)


CUTS = {
    "gpt-oss": Cut(
        ".experts.gate_up_proj.", (".experts.gate_proj.", ".experts.up_proj."),
        lambda _, x: (x[0::2], x[1::2]), lambda _, pieces: torch.stack([*pieces], 1).flatten(0, 1),
    ),
    "granitemoe": Cut(
        ".shared_mlp.input_linear.", (".mlp.shared_experts.gate_proj.", ".mlp.shared_experts.up_proj."),
        lambda _, x: x.chunk(2), lambda _, pieces: torch.cat([*pieces]),
    ),
    "qwen2moe": Cut(
        ".mlp.shared_expert_gate.", (".mlp.shared_expert_gate.",),
        lambda _, x: (x[0],), lambda _, pieces: pieces[0].view(1, -1),
    ),
    "deepseek2": Cut(
        ".self_attn.kv_b_proj.", (".self_attn.k_b_proj.", ".self_attn.v_b_proj."), _keys_and_values, _heads
    ),
}  # fmt: skip
"""By llama.cpp's name of the architecture."""


class Names:
    """GGUF's names of a tensor of transformers', and the order of its rows.

    Args:
        form: of the family.
        text: the configuration of the model that reads text.
    """

    def __init__(self, form: Form, text: Any) -> None:
        arch = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == form.arch)
        self.form, self._text, self._cut = form, text, CUTS.get(form.arch)
        self._heads = {"q_proj": text.num_attention_heads, "k_proj": text.num_key_value_heads}
        self._map = get_tensor_name_map(MODEL_ARCH(arch), text.num_hidden_layers)

    def of(self, target: str) -> str | None:
        """Return GGUF's name, or None where llama.cpp reads no such tensor, or has it in pieces."""
        return None if len(self._pieces(target)) > 1 else self._name(target)

    def _name(self, target: str) -> str | None:
        if target.endswith(".bias") and target.split(".")[-2] not in self.form.biases:
            return None
        if target.endswith(SUFFIXED):
            target = f"{target}.weight"
        for theirs, other in RENAMED:
            target = target.replace(theirs, other)
        found: str | None = self._map.get_name(target, try_suffixes=(".weight", ".bias"))
        return found

    def parts(self, target: str) -> list[str] | None:
        """Return GGUF's names of what a tensor is written as, or None where llama.cpp reads no such tensor."""
        found = []
        for name in [self._name(piece) for piece in self._pieces(target) or (target,)]:
            if name is None:
                return None
            found.append(name)
        return found

    def apart(self, target: str, x: Tensor) -> list[Tensor]:
        """Return what a tensor ``[out, ...]`` is written as, with rows as llama.cpp has them."""
        if self._cut is not None and self._pieces(target):
            return [*self._cut.apart(self._text, x)]
        return [self.ordered(target, x)]

    def together(self, target: str, pieces: Sequence[Tensor]) -> Tensor:
        """Undo :meth:`apart`."""
        if self._cut is not None and self._pieces(target):
            return self._cut.together(self._text, pieces)
        (x,) = pieces
        heads = self._paired(target)
        return x if heads is None else x.view(heads, -1, 2, *x.shape[1:]).transpose(1, 2).reshape(x.shape)

    def ordered(self, target: str, x: Tensor) -> Tensor:
        """Return a tensor ``[out, ...]`` with its rows as llama.cpp has them."""
        heads = self._paired(target)
        return x if heads is None else x.view(heads, 2, -1, *x.shape[1:]).transpose(1, 2).reshape(x.shape)

    def _paired(self, target: str) -> int | None:
        return self._heads.get(target.split(".")[-2]) if self.form.paired else None

    def _pieces(self, target: str) -> list[str]:
        if self._cut is None or self._cut.layer not in target:
            return []
        return [target.replace(self._cut.layer, piece) for piece in self._cut.pieces]


def plain_target(target: str) -> str:
    """Return a tensor's name as it is in a model that reads text alone."""
    for prefix in PREFIXES:
        if target.startswith(prefix):
            rest = target.removeprefix(prefix)
            return rest if rest.startswith("lm_head.") else f"model.{rest.removeprefix('model.')}"
    return target
