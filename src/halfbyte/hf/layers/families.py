"""The families of transformers whose decoder layers are known, and how one is recognised.

A family is recognised by its class and by the text of what is replaced (:func:`digest_of`; the table was written
against transformers 5.23): a subclass, remote code, a patch, or a release that changes a formula is not the family
that is known, and runs as it is.
"""

import ast
import hashlib
import inspect
import re
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

FUSED_ON = ("cpu", "cuda")
"""Types of devices on which there are pieces to fuse."""


def _nothing(attention: Any) -> dict[str, Any]:
    return {}


def _configured_window(attention: Any) -> dict[str, Any]:
    return {"sliding_window": getattr(attention.config, "sliding_window", None)}


def _own_window(attention: Any) -> dict[str, Any]:
    return {"sliding_window": attention.sliding_window}


def _own_window_and_cap(attention: Any) -> dict[str, Any]:
    return {"sliding_window": attention.sliding_window, "softcap": attention.attn_logit_softcapping}


@dataclass(frozen=True)
class Family:
    """A family of transformers: ``models/<folder>/modeling_<folder>.py`` and what is particular about it.

    Attributes:
        name: the prefix of its classes.
        digest: of the functions that are replaced.
        norms: where a decoder layer has its norms: before attention and MLP, before and after them, or after them.
        extras: what its attention passes on beyond scaling and dropout.
        offset: of its RMSNorm's weight.
        rounded: whether its RMSNorm rounds before the weight.
        fp32_angles: whether cosines and sines are fp32 whatever the model's dtype, and queries and keys stay in it.
        mixture: its classes of a mixture of experts and of that one's router, or none.
    """

    name: str
    digest: str
    norms: Literal["before", "around", "after"] = "before"
    extras: Callable[[Any], dict[str, Any]] = _nothing
    offset: float = 0.0
    rounded: bool = True
    fp32_angles: bool = False
    mixture: tuple[str, ...] = ()

    @property
    def module(self) -> str:
        """The module that defines the family."""
        folder = re.sub("Moe$", "_moe", self.name).lower()
        return f"transformers.models.{folder}.modeling_{folder}"

    def of(self, part: str) -> Any:
        """Return the family's own class or function, or None."""
        return vars(sys.modules[self.module]).get(part)

    def fits(self, layer: Any) -> bool:
        """Whether a decoder layer of this family is built from the family's own parts, and where it is fused."""
        return self.is_own(layer) and all(parameter.device.type in FUSED_ON for parameter in layer.parameters())

    def is_own(self, layer: Any) -> bool:
        """Whether a decoder layer of this family is built from the family's own parts."""
        attention, mlp = layer.self_attn, layer.mlp
        return (
            type(attention) is self.of(f"{self.name}Attention")
            and (type(mlp) is self.of(f"{self.name}MLP") or self.is_mixture(mlp))
            and not any("forward" in vars(module) for module in (layer, attention, mlp))
            and getattr(attention.config, "clip_qkv", None) is None
            and not getattr(mlp, "jitter_noise", 0)
        )

    def is_mixture(self, mlp: Any) -> bool:
        """Whether this is the family's own mixture of experts, and its router the family's own."""
        return bool(self.mixture) and type(mlp) is self.of(self.mixture[0]) and self.is_router(mlp.gate)

    def is_router(self, gate: Any) -> bool:
        """Whether this is the family's own router."""
        return type(gate) is self.of(self.mixture[1])

    def turns(self, x: Tensor, position_embeddings: tuple[Tensor, Tensor] | None) -> bool:
        """Whether rotation by these angles keeps the dtype of queries and keys."""
        dtype = torch.float32 if self.fp32_angles else x.dtype
        return position_embeddings is None or position_embeddings[0].dtype == dtype


FAMILIES = {
    f"{family.name}DecoderLayer": family
    for family in (
        Family("Llama", "dc50c4f1a7fea8d2"),
        Family("Mistral", "535aef00e31fc4e9", extras=_configured_window),
        Family("Qwen2", "5d7ce114dd406178", extras=_own_window),
        Family("Qwen3", "5ab423f8f24e9617", extras=_own_window),
        Family("SmolLM3", "0cfdc84b4929ef05", extras=_own_window),
        Family("Phi3", "f7d6135036a636f3", extras=_configured_window),
        Family("Gemma2", "3479c5435cf34b4b", "around", _own_window_and_cap, offset=1.0, rounded=False),
        Family("Gemma3", "2840cb8ae4850127", "around", _own_window, offset=1.0, rounded=False),
        Family("Olmo", "5fba39abaad52718", fp32_angles=True),
        Family("Olmo2", "fb26469ba89f4d25", "after", rounded=False, fp32_angles=True),
        Family("Olmo3", "78418882ebfa3781", "after", _own_window, rounded=False, fp32_angles=True),
        Family("Ministral", "5d7ce114dd406178", extras=_own_window),
        Family(
            "Mixtral",
            "68f3abdc35466202",
            extras=_configured_window,
            mixture=("MixtralSparseMoeBlock", "MixtralTopKRouter"),
        ),
        Family("Qwen2Moe", "1aeeee6725244ace", mixture=("Qwen2MoeSparseMoeBlock", "Qwen2MoeTopKRouter")),
        Family(
            "Qwen3Moe", "139d6a744355dd35", extras=_own_window, mixture=("Qwen3MoeSparseMoeBlock", "Qwen3MoeTopKRouter")
        ),
        Family(
            "Olmoe", "2acfb88894d9b429", extras=_configured_window, mixture=("OlmoeSparseMoeBlock", "OlmoeTopKRouter")
        ),
        Family("Glm4Moe", "6faa9cbcafc20318", mixture=("Glm4MoeMoE", "Glm4MoeTopkRouter")),
    )
}


def recognise(cls: type[nn.Module]) -> Family | None:
    """Return the family whose own, unchanged decoder layer ``cls`` is."""
    family = FAMILIES[cls.__name__]
    if cls.__module__ != family.module or cls is not family.of(cls.__name__):
        return None
    try:
        return family if digest_of(family) == family.digest else None
    except (OSError, TypeError, SyntaxError):  # no source of a function's own, as for a lambda: not what is known
        return None


def digest_of(family: Family) -> str:
    """Return the digest of all that the fused layers do in place of the family's own code.

    It is taken over arguments and statements, without annotations, docstrings and comments.
    """
    classes = [family.of(f"{family.name}{part}") for part in ("DecoderLayer", "Attention", "MLP", "RMSNorm")]
    norm = classes[-1]
    classes += [family.of(name) for name in family.mixture]
    functions = [inspect.unwrap(cls.forward) for cls in classes if cls is not None]
    functions += [family.of("apply_rotary_pos_emb"), family.of("rotate_half"), getattr(norm, "_norm", None)]
    lines = []
    for function in functions:
        if function is not None:
            tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function)))).body[0]
            if not isinstance(tree, ast.FunctionDef):
                raise TypeError(f"{function} is not defined by a statement")
            lines.append(",".join(argument.arg for argument in (*tree.args.args, *tree.args.kwonlyargs)))
            lines += [ast.unparse(node) for node in tree.body[ast.get_docstring(tree) is not None :]]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
