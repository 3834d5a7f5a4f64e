"""Which parts of a model attend over key ranges (:mod:`halfbyte.hf.layers.attention`), and why the others do not.

Nothing is listed by family. The mask that our way hands out is a mask to all who compute with it, so that only two
things have to be known of a model, and both are read from the files that define its modules: that it takes its
attention from transformers' registry, and that it does nothing else with the name in ``config._attn_implementation``
(sparse attention asks for ``sdpa`` by name before it narrows the mask). What is not understood keeps SDPA.
"""

import functools
import inspect
import re
import sys
from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel

from halfbyte.hf.layers import attention

# What the models of transformers 5.23 do with the name that says nothing about ours.
_HARMLESS = re.compile(
    r"""
      \.get_interface\(\s*[\w.]+\._attn_implementation\b                      # asked for the function
    | \bALL_ATTENTION_FUNCTIONS\[[\w.]+\._attn_implementation\]
    | [\w.]*\b_?attn_implementation\s=\s[\w.]+\._attn_implementation$         # handed on
    | \{[\w.]+\._attn_implementation\}                                        # told in a message
    | \._attn_implementation\s==\s"(eager|flex_attention)"                    # set apart from what is neither
    | \._attn_implementation\s==\s"sdpa"\s+and\s\(logits_to_keep\s>\s1[^\n]*\)\s+and\sany\(mask\sis\sNone  # never is
    """,
    re.VERBOSE | re.MULTILINE,
)
_NAME = re.compile(r"""\._?attn_implementation\b|["']_attn_implementation["']""")
_APART = ("torch", "peft", "halfbyte")
"""Packages whose modules do not choose an attention."""
_COMMENT = re.compile(r"[ \t]*#.*")


def choose_attention(model: PreTrainedModel) -> None:
    """Let every part of ``model`` for which transformers (5.23) chose SDPA attend our way, if it can.

    A part that is eager because SDPA has no soft caps (Gemma 2) need not be.
    """
    for part in parts_of(model):
        capped = hasattr(part.config, "attn_logit_softcapping") and part._supports_flash_attn
        if part.config._attn_implementation in (("sdpa", "eager") if capped else ("sdpa",)) and not _obstacle(part):
            # what set_attn_implementation does for one part, without its warnings about others
            part.config._attn_implementation_internal = attention.NAME


def describe_attention(model: nn.Module, device: str | None = None) -> str:
    """Return how the parts of ``model`` attend, for a run's log.

    Args:
        model: it.
        device: the type of the one that it will run on, where that is not the one that it is on.

    For example ``over key ranges`` or ``sdpa: FalconForCausalLM does not take its attention from the registry``.
    """
    ways = []
    for part in parts_of(model):
        name = part.config._attn_implementation
        if name == attention.NAME:
            on_cpu = (device or part.device.type) == "cpu"
            ways.append("over key ranges" if on_cpu else "over segments, by torch's own kernels")
        elif name is not None:
            obstacle = _obstacle(part)
            ways.append(f"{name}: {type(part).__name__} {obstacle}" if obstacle else name)
    return "; ".join(dict.fromkeys(ways)) or "there is none"


def parts_of(model: nn.Module) -> list[PreTrainedModel]:
    """Return the models within ``model`` that have a configuration of their own, outermost first."""
    parts: dict[int, PreTrainedModel] = {}
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            parts.setdefault(id(module.config), module)
    return list(parts.values())


def _obstacle(part: PreTrainedModel) -> str | None:
    """Return what keeps ``part`` from attending our way, as the end of a sentence."""
    own = list(_own_modules(part, part))
    if not all(module._can_set_attn_implementation() for module in own if isinstance(module, PreTrainedModel)):
        return "does not take its attention from transformers' registry"
    files = {type(module).__module__ for module in own}
    reading = sorted(file for file in files if file.split(".")[0] not in _APART and _reads_the_name(file))
    return f"does more with the implementation's name than ask for it ({', '.join(reading)})" if reading else None


def _own_modules(module: nn.Module, part: PreTrainedModel) -> Iterator[nn.Module]:
    """Yield ``module`` and all in it that ``part``'s configuration is for."""
    if isinstance(module, PreTrainedModel) and module.config is not part.config:
        return
    yield module
    for child in module.children():
        yield from _own_modules(child, part)


@functools.cache
def _reads_the_name(module: str) -> bool:
    """Whether the file of ``module`` uses the name of the implementation in a way that is not known."""
    try:
        text = inspect.getsource(sys.modules[module])
    except (OSError, TypeError, KeyError):
        return True
    return _NAME.search(_HARMLESS.sub("", _COMMENT.sub("", text))) is not None
