"""Open any model: a 16-bit folder or hub id (quantized while it is read), a 4-bit folder (mapped), an adapter folder.

A folder already in bitsandbytes' 4 bits opens without a copy: transformers maps the safetensors file, and the packed
weights stay views of the mapping, which the operating system pages in and out and which processes share.
"""

import json
import logging
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError
from peft import PeftModel
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from halfbyte.choices import QUANT_TYPE
from halfbyte.errors import InputError, nearest
from halfbyte.hf.layers.prepare import prepare
from halfbyte.hf.models.adapter_files import put_adapter
from halfbyte.hf.models.checkpoint import weight_files
from halfbyte.hf.models.config import HalfbyteConfig
from halfbyte.hf.models.hub import Place, locate
from halfbyte.hf.models.linears import bits_of, largest_dense, share_quantized
from halfbyte.hf.models.quantizer import kept_failures

logger = logging.getLogger(__name__)

ADAPTER = "adapter_config.json"
CONFIG = "config.json"
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tekken.json")
"""The files of which a folder with a tokenizer has one."""

# What transformers reads weights from besides the files of the folder.
ELSEWHERE = ("gguf_file", "state_dict", "subfolder", "variant")


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
        The model in evaluation mode; with an adapter, a PEFT model ready to run. It logs a warning where less than
        half of the weights are in 4 bits.

    Raises:
        InputError: there is no such folder, nothing in it that can be opened, or its weights are damaged or not those
            that its configuration describes.
    """
    place = locate(path)
    if (Path(place.path) / ADAPTER).is_file():
        base = _load_at(_base_of(place), quantization_config, auto_class, trust_remote_code, kwargs)
        return prepare(put_adapter(base, Path(place.path)))
    return _load_at(place, quantization_config, auto_class, trust_remote_code, kwargs)


def _load_at(
    place: Place,
    quantization_config: HalfbyteConfig | None,
    auto_class: Any,
    trust_remote_code: bool,
    kwargs: dict[str, Any],
) -> PreTrainedModel:
    config = config_at(place, trust_remote_code)
    held = getattr(config, "quantization_config", None)
    if held is not None:
        ours = HalfbyteConfig.from_folder(held if isinstance(held, dict) else held.to_dict())
        if quantization_config is not None:
            _check_wish(place, ours, quantization_config)
            ours.compute_dtype = quantization_config.compute_dtype
        # transformers refuses another quantizer's object on a quantized folder, so ours goes where it looks.
        config.quantization_config = ours.in_memory()
        quantization_config = None
    else:
        quantization_config = quantization_config or HalfbyteConfig()
    if place.is_folder and not any(name in kwargs for name in ELSEWHERE):
        files = weight_files(Path(place.path), getattr(config, "transformers_weights", None))
        kwargs.setdefault("use_safetensors", files[0].suffix == ".safetensors")
    with kept_failures() as failures:
        try:
            model = (auto_class or model_class(config)).from_pretrained(
                place.path,
                config=config,
                quantization_config=quantization_config,
                trust_remote_code=trust_remote_code,
                **place.options | kwargs,
            )
        except RuntimeError:
            if failures.error is not None:
                raise failures.error from None  # transformers went on, and made text of it
            if failures.resized:
                raise InputError(
                    f"The weights of {place.path} are for other classes: {'; '.join(failures.resized)}. Set num_labels "
                    "as it was, or ignore_mismatched_sizes=True to make them anew."
                ) from None
            raise
        except (OSError, SafetensorError) as error:
            raise InputError(_sentence(f"The weights of {place.path} cannot be read: {error}")) from error
        except ValueError as error:
            _say_remote_code(place.path, error)
            raise
    bits = bits_of(model)
    if bits is None:
        return model
    share = share_quantized(model)
    logger.info("%.0f %% of the weights of %s are in %d bits.", 100 * share, place.path, bits)
    if share < 0.5:
        logger.warning(
            "Only %.0f %% of the weights of %s are in %d bits; the others, of which %s is the largest, stay in %s.",
            100 * share, place.path, bits, largest_dense(model), str(model.dtype).removeprefix("torch."),
        )  # fmt: skip
    return model


def _check_wish(place: Place, held: HalfbyteConfig, wish: HalfbyteConfig) -> None:
    """Check that nobody asks for another number format than a folder has; the default asks for none.

    Raises:
        InputError: somebody does.
    """
    if wish.quant_type not in (held.quant_type, QUANT_TYPE):
        raise InputError(
            f"The weights of {place.path} are in {held.quant_type} already, so that they cannot be opened in "
            f"{wish.quant_type}; leave quant_type out, or start from the 16-bit original."
        )


def load_tokenizer(path: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Open the tokenizer of a model folder, hub id, or adapter folder (its own, or else its base model's).

    Raises:
        InputError: there is none.
    """
    place = locate(path)
    folder = Path(place.path)
    if (folder / ADAPTER).is_file() and not (folder / "tokenizer_config.json").is_file():
        place = _base_of(place)
    try:
        return AutoTokenizer.from_pretrained(place.path, trust_remote_code=trust_remote_code, **place.options)
    except (OSError, ValueError) as error:
        _say_remote_code(place.path, error)
        if place.is_folder and not any((Path(place.path) / name).is_file() for name in TOKENIZERS):
            message = (
                f"The folder {place.path} holds no tokenizer; copy tokenizer.json and tokenizer_config.json into it."
            )
        else:
            message = _sentence(f"The tokenizer of {place.path} cannot be opened: {error}")
        raise InputError(message) from error


def read_config(path: str | Path, trust_remote_code: bool = False) -> Any:
    """Read the configuration of the model folder or hub id ``path``.

    Raises:
        InputError: there is none, or it does not describe a model that transformers knows.
    """
    return config_at(locate(path), trust_remote_code)


def model_class(config: Any) -> Any:
    """Return the class for the model of ``config``.

    It is the one that the architecture names, with code of the model's own the auto class that this is for, and where
    neither says anything (or a name of somebody's own) a language model's, or else that of the bare model.
    """
    for name in getattr(config, "auto_map", None) or {}:
        if name.startswith("AutoModel") and hasattr(transformers, name):
            return getattr(transformers, name)
    for name in config.architectures or []:
        if hasattr(transformers, name):
            return getattr(transformers, name)
    for auto in (transformers.AutoModelForSeq2SeqLM, transformers.AutoModelForCausalLM):
        if type(config) in auto._model_mapping:
            return auto._model_mapping[type(config)]
    return transformers.AutoModel


def _base_of(place: Place) -> Place:
    """Return where the base model of the adapter in ``place`` is."""
    file = Path(place.path) / ADAPTER
    base = _json_of(file).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise InputError(f"{file} does not name a base model (base_model_name_or_path): it is not a PEFT adapter.")
    try:
        return locate(base)
    except InputError as error:
        raise InputError(f"{file} names {base} as its base model, but it is not there. {error}") from error


def config_at(place: Place, trust_remote_code: bool) -> Any:
    """Read the configuration of the model in ``place``; as :func:`read_config`."""
    file = Path(place.path) / CONFIG
    if place.is_folder:
        if not file.is_file():
            named = sorted(Path(place.path).glob("*.gguf"))
            what = f"only {named[0].name}, which is GGUF" if named else f"neither {CONFIG} nor {ADAPTER}"
            remedy = (
                f"write a model's folder of it with transformers' from_pretrained({place.path!r}, gguf_file="
                f"{named[0].name!r}) and save_pretrained"
                if named
                else "there is no model in it"
            )
            raise InputError(f"The folder {place.path} holds {what}: {remedy}.")
        if not _json_of(file).get("model_type"):
            raise InputError(f"{file} has no model_type, which says what it describes; add the family's, as llama.")
    try:
        config = AutoConfig.from_pretrained(place.path, trust_remote_code=trust_remote_code, **place.options)
    except (OSError, ValueError, KeyError, AttributeError, TypeError, StrictDataclassError) as error:
        # Nothing but the file's values is at work here, unless code of its own is.
        _say_remote_code(place.path, error)
        if trust_remote_code and not isinstance(error, OSError):
            raise
        text = error.args[0] if isinstance(error, KeyError) else error
        raise InputError(_sentence(f"{file if place.is_folder else place.path} cannot be used: {text}")) from error
    _check_choices(config, file if place.is_folder else place.path)
    return config


def _check_choices(config: Any, where: Any) -> None:
    """Check what transformers (5.23) looks up in a table only when it builds the model."""
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    ropes = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    chosen = [(key, getattr(text, key, None), ACT2FN) for key in ("hidden_act", "hidden_activation")]
    chosen += [("rope_type", one.get("rope_type"), {"default", *ROPE_INIT_FUNCTIONS}) for one in ropes]
    for key, value, known in chosen:
        if isinstance(value, str) and value not in known:
            raise InputError(f"{where} has {key} {value!r}{nearest(value, known)}, which transformers does not know.")


def _json_of(file: Path) -> dict[str, Any]:
    try:
        read = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read ({error}): it is not JSON; copy it again.") from error
    if not isinstance(read, dict):
        raise InputError(f"{file} holds no settings, but {type(read).__name__}: copy it again.")
    return read


def _say_remote_code(path: str, error: Exception) -> None:
    if "trust_remote_code" in str(error):
        raise InputError(
            f"The model {path} comes with code of its own; read it, then allow it with trust_remote_code "
            "(--trust-remote-code)."
        ) from error


def _sentence(text: str) -> str:
    """Return ``text`` on one line, without the advice that libraries append after a line break."""
    lines = [line.strip() for line in text.strip().split("\n") if line.strip()]
    first = lines[0]
    if first.endswith(":") and len(lines) > 1:
        first = f"{first} {lines[1]}"
    return first
