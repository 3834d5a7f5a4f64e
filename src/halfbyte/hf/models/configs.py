"""A model's configuration: read, or refused in a sentence; and the class that it is opened with."""

import json
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from halfbyte.errors import InputError, nearest
from halfbyte.hf.models.foreign.gguf import complete, header_of, keep_header, mixture_config, open_gguf
from halfbyte.hf.models.hub import ADAPTER as ADAPTER
from halfbyte.hf.models.hub import Place, locate

CONFIG = "config.json"


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


def config_at(place: Place, trust_remote_code: bool) -> Any:
    """Read the configuration of the model in ``place``; as :func:`read_config`."""
    file = place.gguf or Path(place.path) / CONFIG
    source, options, is_kept = place.path, place.options, False
    if place.gguf:
        is_kept = (header_of(place.gguf) / CONFIG).is_file()
        if is_kept:
            source, options = str(header_of(place.gguf)), {}
        else:
            open_gguf(place.gguf)
    elif place.is_folder:
        if not file.is_file():
            raise InputError(f"The folder {place.path} holds neither {CONFIG} nor {ADAPTER}: there is no model in it.")
        if not json_of(file).get("model_type"):
            raise InputError(f"{file} has no model_type, which says what it describes; add the family's, as llama.")
    mixture = None
    try:
        mixture = mixture_config(place.gguf) if place.gguf and not is_kept else None
        config = mixture or AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code, **options)
    except InputError:
        raise
    except (
        OSError,
        ValueError,
        LookupError,
        AttributeError,
        TypeError,
        ArithmeticError,
        StrictDataclassError,
    ) as error:
        # Nothing but the file's values is at work here, unless code of its own is.
        say_remote_code(place.path, error)
        if trust_remote_code and not isinstance(error, OSError):
            raise
        text = error.args[0] if isinstance(error, KeyError) else error
        raise InputError(sentence(f"{file if place.is_folder else place.path} cannot be used: {text}")) from error
    _check_choices(config, file if place.is_folder else place.path)
    if is_kept or mixture:
        config.name_or_path = place.path
    if place.gguf and not is_kept:
        if not mixture:
            complete(config, place.gguf)
        keep_header(place.gguf, config)
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


def json_of(file: Path) -> dict[str, Any]:
    """Read a file of settings.

    Raises:
        InputError: it cannot be read, or is not one.
    """
    try:
        read = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file} cannot be read ({error}): it is not JSON; copy it again.") from error
    if not isinstance(read, dict):
        raise InputError(f"{file} holds no settings, but {type(read).__name__}: copy it again.")
    return read


def say_remote_code(path: str, error: Exception) -> None:
    """Raise an InputError where ``error`` is that code of a model's own may not run."""
    if "trust_remote_code" in str(error):
        raise InputError(
            f"The model {path} comes with code of its own; read it, then allow it with trust_remote_code "
            "(--trust-remote-code)."
        ) from error


def sentence(text: str) -> str:
    """Return ``text`` on one line, without the advice that libraries append after a line break."""
    lines = [line.strip() for line in text.strip().split("\n") if line.strip()]
    first = lines[0]
    if first.endswith(":") and len(lines) > 1:
        first = f"{first} {lines[1]}"
    return first
