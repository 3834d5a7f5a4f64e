"""bitsandbytes for scripts that import it: ``bnb.nn.Linear4bit``, ``bnb.optim.PagedAdamW8bit`` and their kin.

Where bitsandbytes is installed, its layers, their parameters, its Adam optimizers and its 4-bit functions are ours
(:mod:`.bnb_layers`, :mod:`.bnb_layers_8bit`, :mod:`.bnb_optimizers`, :mod:`.bnb_functional`), and everything else of it
stays: its other functions work on the same bytes and states, and its other optimizers and layers run as they did. (The
names are replaced in its modules and not when a script imports it, since peft imports it at once where it is there.)

Where it is not, modules of these names stand in (``sys.modules``). They have those classes and the functions of
:mod:`.bnb_functional`; any other name is an ``AttributeError`` (``ImportError`` in ``from ... import``) that says so.
transformers, peft and accelerate go on without bitsandbytes: they are asked whether there is one before the modules
appear, and they remember the answer; what asks again asks for the version in pip's metadata, of which there is none.
"""

import importlib.machinery
import importlib.util
import types
from collections.abc import Callable, Mapping
from typing import Any

import peft.import_utils
import transformers.utils

from halfbyte.errors import nearest
from halfbyte.hf.dropin import bnb_embeddings, bnb_functional, bnb_layers, bnb_layers_8bit, bnb_optimizers, bnb_state
from halfbyte.hf.replacement import Replacement
from halfbyte.kernels import bitsandbytes as provider

VERSION = "0.50.2"
"""The release whose names and signatures these are."""
VERSIONS = ">=0.50"

FUNCTIONAL: dict[str, Any] = {
    "QuantState": bnb_state.QuantState,
    **{
        name: getattr(bnb_functional, name)
        for name in (
            *("quantize_4bit", "dequantize_4bit", "quantize_nf4", "quantize_fp4", "dequantize_nf4", "dequantize_fp4"),
            *("quantize_blockwise", "dequantize_blockwise", "get_4bit_type", "create_dynamic_map"),
            *("int8_vectorwise_quant", "int8_vectorwise_dequant"),
        )
    },
}
MATMUL = {"matmul_4bit": bnb_functional.matmul_4bit, "MatmulLtState": bnb_layers_8bit.MatmulLtState}
LAYERS: dict[str, Any] = {
    "Linear4bit": bnb_layers.Linear4bit,
    "LinearNF4": bnb_layers.LinearNF4,
    "LinearFP4": bnb_layers.LinearFP4,
    "Params4bit": bnb_layers.Params4bit,
    "Linear8bitLt": bnb_layers_8bit.Linear8bitLt,
    "Int8Params": bnb_layers_8bit.Int8Params,
}
EMBEDDINGS = {"Embedding": bnb_embeddings.Embedding, "StableEmbedding": bnb_embeddings.StableEmbedding}
MANAGER = {"GlobalOptimManager": bnb_optimizers.GlobalOptimManager}
MODULES: dict[str, dict[str, Any]] = {
    "bitsandbytes": {"__version__": VERSION, "features": {"multi_backend"}, **MATMUL},
    "bitsandbytes.nn": LAYERS | EMBEDDINGS,
    "bitsandbytes.nn.modules": LAYERS | EMBEDDINGS,
    "bitsandbytes.functional": FUNCTIONAL,
    "bitsandbytes.autograd": {},
    "bitsandbytes.autograd._functions": MATMUL,
    "bitsandbytes.optim": bnb_optimizers.OPTIMIZERS | MANAGER,
    "bitsandbytes.optim.optimizer": MANAGER,
    "bitsandbytes.optim.adam": {k: v for k, v in bnb_optimizers.OPTIMIZERS.items() if "AdamW" not in k},
    "bitsandbytes.optim.adamw": {k: v for k, v in bnb_optimizers.OPTIMIZERS.items() if "AdamW" in k},
}
"""The modules that stand in, and what they have beside each other."""


def rows() -> list[Replacement]:
    """What is replaced of bitsandbytes, or stands in for it."""
    return _names() if importlib.util.find_spec("bitsandbytes") else _modules()


def _names() -> list[Replacement]:
    replaced: dict[str, tuple[Mapping[str, Any], str]] = {
        "bitsandbytes": ({"matmul_4bit": MATMUL["matmul_4bit"]}, "the product of packed weights is ours"),
        "bitsandbytes.functional": (
            {name: FUNCTIONAL[name] for name in ("QuantState", "quantize_4bit", "dequantize_4bit")},
            "packed weights that a script makes or opens itself; theirs misplaces constants of uneven rows on a CPU",
        ),
        "bitsandbytes.nn": (LAYERS, "a script's own 4-bit and 8-bit layers are ours, and ours count as of its classes"),
        "bitsandbytes.nn.modules": (LAYERS, "the same names where they are defined"),
        "bitsandbytes.optim": (bnb_optimizers.OPTIMIZERS, "a script's own Adam and AdamW are our AdamW"),
        "bitsandbytes.optim.adam": (MODULES["bitsandbytes.optim.adam"], "the same names where they are defined"),
        "bitsandbytes.optim.adamw": (MODULES["bitsandbytes.optim.adamw"], "the same names where they are defined"),
    }
    return [
        _row(f"{module}:{name}", value, why)
        for module, (values, why) in replaced.items()
        for name, value in values.items()
    ]


def _modules() -> list[Replacement]:
    provider.available()  # these remember that there is no bitsandbytes: see the head of this file
    transformers.utils.is_bitsandbytes_available()
    peft.import_utils.is_bnb_available()
    peft.import_utils.is_bnb_4bit_available()
    made = {name: _module(name, values) for name, values in MODULES.items()}
    for name, module in made.items():
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(made[parent], last, module)
    return [
        _row(f"sys.modules[{name}]", module, "import bitsandbytes, which is not installed, in a script")
        for name, module in made.items()
    ]


def _row(where: str, value: Any, why: str) -> Replacement:
    return Replacement(where, _giving(value), why, "bitsandbytes", VERSIONS)


def _giving(value: Any) -> Callable[[Any], Any]:
    return lambda old: value


def _module(name: str, values: dict[str, Any]) -> types.ModuleType:
    module = types.ModuleType(name, f"halfbyte in place of {name}, which is not installed.")
    module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
    module.__path__ = []
    vars(module).update(values)
    known = [key for key in values if not key.startswith("__")]

    def missing(attribute: str) -> Any:
        if attribute.startswith("__"):
            raise AttributeError(f"module {name!r} has no attribute {attribute!r}")
        raise AttributeError(
            f"bitsandbytes is not installed, and halfbyte, which stands in for it, has no "
            f"{name}.{attribute}{nearest(attribute, known)}: install bitsandbytes for it."
        )

    vars(module)["__getattr__"] = missing
    return module
