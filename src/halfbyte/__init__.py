"""halfbyte: QLoRA as a finished system, on the machine you have.

    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=halfbyte.HalfbyteConfig())
    model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    model = halfbyte.prepare(model)
    optimizer = halfbyte.optim.AdamW(model.parameters(), lr=2e-4, state_bits=8, paged=True)

Names are imported when they are first used, so that ``import halfbyte`` costs nothing. Using any name of ``hf``
registers the quantizer with transformers; nothing else of any library is touched, until a script calls ``install()``.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from halfbyte import optim
    from halfbyte.errors import InputError
    from halfbyte.hf import HalfbyteConfig, load, load_tokenizer, prepare, prepare_for_training, unprepare
    from halfbyte.hf.install import install, undo
    from halfbyte.nn import Linear4bit, Linear8bit
    from halfbyte.quant import QuantizedWeight, quantize_4bit

__version__ = "0.2.0"

_HOMES = {
    "HalfbyteConfig": "halfbyte.hf",
    "InputError": "halfbyte.errors",
    "Linear4bit": "halfbyte.nn",
    "Linear8bit": "halfbyte.nn",
    "QuantizedWeight": "halfbyte.quant",
    "install": "halfbyte.hf.install",
    "load": "halfbyte.hf",
    "load_tokenizer": "halfbyte.hf",
    "prepare": "halfbyte.hf",
    "prepare_for_training": "halfbyte.hf",
    "quantize_4bit": "halfbyte.quant",
    "undo": "halfbyte.hf.install",
    "unprepare": "halfbyte.hf",
}

__all__ = [
    "HalfbyteConfig",
    "InputError",
    "Linear4bit",
    "Linear8bit",
    "QuantizedWeight",
    "install",
    "load",
    "load_tokenizer",
    "optim",
    "prepare",
    "prepare_for_training",
    "quantize_4bit",
    "undo",
    "unprepare",
]


_PACKAGES = ("data", "evaluate", "generate", "hf", "kernels", "nn", "optim", "plan", "quant", "runs", "train")


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return importlib.import_module(f"halfbyte.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'halfbyte' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def load_ipython_extension(ipython: Any) -> None:
    """Install, as ``%load_ext halfbyte`` asks."""
    home = importlib.import_module("halfbyte.hf.install")
    home.install()
    if ipython is not None:
        home.attend(ipython)


def unload_ipython_extension(ipython: Any) -> None:
    """Undo it, as ``%unload_ext halfbyte`` asks."""
    importlib.import_module("halfbyte.hf.install").undo()
