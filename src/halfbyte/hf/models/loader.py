"""Open any model: a 16-bit folder or hub id (quantized while it is read), a 4-bit folder (mapped), an adapter folder.

A folder already in bitsandbytes' 4 bits opens without a copy: transformers maps the safetensors file, and the packed
weights stay views of the mapping, which the operating system pages in and out and which processes share.
"""

import json
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub.errors import HFValidationError
from peft import PeftModel
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from halfbyte.errors import InputError
from halfbyte.hf.layers.prepare import prepare
from halfbyte.hf.models.adapter_files import put_adapter
from halfbyte.hf.models.config import HalfbyteConfig

ADAPTER = "adapter_config.json"
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tekken.json")
"""The files of which a folder with a tokenizer has one."""


def load(
    path: str | Path,
    *,
    quantization_config: HalfbyteConfig | None = None,
    auto_class: Any = None,
    trust_remote_code: bool = False,
    **kwargs: Any,
) -> PreTrainedModel | PeftModel:
    """Open the model at ``path`` in 4 bits.

    Args:
        path: a folder or a hub id: a 16-bit or 32-bit model, a model in bitsandbytes' 4-bit format, or a LoRA adapter
            (a run's folder is one), which is put on its base model.
        quantization_config: how to quantize; None takes the defaults. For a folder already in 4 bits only its
            ``compute_dtype`` counts; None keeps the folder's.
        auto_class: the transformers class to open it with; None takes the one that the model's architecture names,
            so that encoders and sequence-to-sequence models open too.
        trust_remote_code: run code that comes with the model.
        **kwargs: handed to transformers' ``from_pretrained``.

    Returns:
        The model in evaluation mode; with an adapter, a PEFT model ready to run.

    Raises:
        InputError: there is no such folder, or nothing in it that can be opened.
    """
    path = str(path)
    if (Path(path) / ADAPTER).is_file():
        base = _adapter_base(Path(path))
        model = load(
            base,
            quantization_config=quantization_config,
            auto_class=auto_class,
            trust_remote_code=trust_remote_code,
            **kwargs,
        )
        return prepare(put_adapter(model, Path(path)))
    config = read_config(path, trust_remote_code)
    held = getattr(config, "quantization_config", None)
    if held is not None:
        ours = HalfbyteConfig.from_bitsandbytes(held if isinstance(held, dict) else held.to_dict())
        if quantization_config is not None:
            ours.compute_dtype = quantization_config.compute_dtype
        # transformers refuses another quantizer's object on a quantized folder, so ours goes where it looks.
        config.quantization_config = ours.in_memory()
        quantization_config = None
    else:
        quantization_config = quantization_config or HalfbyteConfig()
    try:
        return (auto_class or model_class(config)).from_pretrained(
            path,
            config=config,
            quantization_config=quantization_config,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            **kwargs,
        )
    except (OSError, SafetensorError) as error:
        raise InputError(_first_sentence(f"The model {path} cannot be opened: {error}")) from error
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise InputError(
            f"The model {path} comes with code of its own; read it, then allow it with trust_remote_code "
            "(--trust-remote-code)."
        ) from error
    except RuntimeError as error:
        # transformers has logged a table of what did not fit, and says so in its error.
        if "conversion of the weights" not in str(error) and "mismatch" not in str(error):
            raise
        raise InputError(f"The model {path} cannot be opened: its weights do not fit its configuration.") from error


def load_tokenizer(path: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Open the tokenizer of a model folder, hub id, or adapter folder (its own, or else its base model's).

    Raises:
        InputError: there is none.
    """
    path = str(path)
    folder = Path(path)
    if (folder / ADAPTER).is_file() and not (folder / "tokenizer_config.json").is_file():
        path = _adapter_base(folder)
    if not Path(path).is_dir():
        read_config(path, trust_remote_code)
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        if Path(path).is_dir() and not any((Path(path) / name).is_file() for name in TOKENIZERS):
            message = f"The folder {path} holds no tokenizer; copy tokenizer.json and tokenizer_config.json into it."
        else:
            message = _first_sentence(f"The tokenizer of {path} cannot be opened: {error}")
        raise InputError(message) from error


def _adapter_base(folder: Path) -> str:
    try:
        base = json.loads((folder / ADAPTER).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"{folder / ADAPTER} does not name a base model ({error}): it is not a PEFT adapter."
        ) from error
    return str(base)


def read_config(path: str, trust_remote_code: bool) -> Any:
    """Read the configuration of the model folder or hub id ``path``.

    Raises:
        InputError: there is none.
    """
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{path} is a file; give the folder of a model, an adapter or a run.")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise InputError(f"The folder {path} holds neither config.json nor {ADAPTER}: there is no model in it.")
    if not folder.exists() and (folder.is_absolute() or path.startswith(".") or path.count("/") > 1):
        raise InputError(f"There is no folder {path}; give the folder of a model, an adapter or a run, or a hub id.")
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, HFValidationError) as error:
        raise InputError(_first_sentence(f"The model {path} cannot be opened: {error}")) from error


def model_class(config: Any) -> Any:
    """Return the class that the configuration's architecture names, or else the auto class of its bare model."""
    if hasattr(config, "auto_map"):
        return transformers.AutoModelForCausalLM
    for name in config.architectures or []:
        if hasattr(transformers, name):
            return getattr(transformers, name)
    return transformers.AutoModel


def _first_sentence(text: str) -> str:
    """Return ``text`` on one line, without the advice that libraries append after a line break."""
    return text.strip().split("\n")[0].strip()
