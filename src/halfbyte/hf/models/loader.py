"""Open any model: a 16-bit folder or hub id (quantized while it is read), a 4-bit folder (mapped), an adapter folder.

A folder already in bitsandbytes' 4 bits opens without a copy: transformers maps the safetensors file, and the packed
weights stay views of the mapping, which the operating system pages in and out and which processes share.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from peft import PeftModel
from safetensors import SafetensorError
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from halfbyte import devices
from halfbyte.choices import QUANT_TYPE, Device, Task
from halfbyte.errors import InputError
from halfbyte.hf.layers.prepare import prepare
from halfbyte.hf.models import paging
from halfbyte.hf.models.adapter_files import put_adapter
from halfbyte.hf.models.base_files import Source, check_base
from halfbyte.hf.models.base_format import base_format
from halfbyte.hf.models.checkpoint import weight_files
from halfbyte.hf.models.config import HalfbyteConfig
from halfbyte.hf.models.configs import ADAPTER, CONFIG, config_at, json_of, model_class, say_remote_code, sentence
from halfbyte.hf.models.converted import converted, is_too_large, shared
from halfbyte.hf.models.foreign.gguf import tokenizer_source
from halfbyte.hf.models.foreign.packed import packing_of
from halfbyte.hf.models.heads import adapter_classes, adapter_task, check_task, hold_in_fp32, set_classes
from halfbyte.hf.models.hub import Place, locate
from halfbyte.hf.models.linears import bits_of, dense_stacks, largest_dense, share_quantized
from halfbyte.hf.models.quantizer import is_watched, kept_failures
from halfbyte.kernels import native
from halfbyte.memory import free_memory

logger = logging.getLogger(__name__)

_MAPPED: dict[str, None] = {}
"""Models of this process whose weights are mapped, for what is said where a file of theirs is cut."""

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tekken.json")
"""The files of which a folder with a tokenizer has one."""

# What transformers reads weights from besides the files of the folder, or of which version.
ELSEWHERE = ("gguf_file", "state_dict", "subfolder", "variant")
OTHERS = (*ELSEWHERE, "revision", "transformers_weights")


def load(
    path: str | Path,
    *,
    quantization_config: HalfbyteConfig | None = None,
    auto_class: Any = None,
    trust_remote_code: bool = False,
    task: Task = "lm",
    classes: Sequence[str] | None = None,
    device: Device | None = None,
    **kwargs: Any,
) -> PreTrainedModel | PeftModel:
    """Open the model at ``path`` in 4 bits.

    Args:
        path: a folder or a hub id: a 16-bit or 32-bit model, a model in bitsandbytes' 4-bit or 8-bit format, or a LoRA
            adapter (a run's folder is one), which is put on its base model. Or a GGUF file, or a folder in GPTQ's,
            AWQ's or MXFP4's format: quantized anew, once, and kept in the cache.
        quantization_config: how to quantize; None takes the defaults, or for an adapter what it was trained over. For a
            folder already in 4 or 8 bits only its ``compute_dtype`` counts; None keeps the folder's.
        auto_class: the transformers class to open it with; None takes the one that the model's architecture names,
            so that encoders and sequence-to-sequence models open too.
        trust_remote_code: run code that comes with the model.
        task: what it is to do; an adapter's folder says it itself. A classifier's head is in fp32.
        classes: names of a classifier's classes, in the order of their numbers; None takes the model's own. A head for
            so many others than these is made anew.
        device: where it runs (:mod:`halfbyte.devices`); None: where ``device_map`` says, or else as ``auto``. A weight
            is quantized there, on its way from the file: no more of the model is in 16 bits than one tensor.
        **kwargs: handed to transformers' ``from_pretrained``.

    Returns:
        The model in evaluation mode; with an adapter, a PEFT model ready to run. It logs a warning where less than
        half of the weights are in 4 bits.

    Raises:
        InputError: there is no such folder, nothing in it that can be opened, or its weights are damaged or not those
            that its configuration describes; an adapter was trained on another base; or there is no such device.
    """
    if device is not None:
        kwargs = {"device_map": {"": str(devices.choose(device))}} | kwargs
    place = locate(path)
    folder = Path(place.path)
    if (folder / ADAPTER).is_file():
        base = base_of_adapter(place)
        if (task := adapter_task(json_of(folder / ADAPTER))) == "classify" and auto_class is None:
            classes = adapter_classes(folder)
        follows = task == "classify"
        quantization_config = quantization_config or base_format(folder)
        model = _load_at(
            base, quantization_config, auto_class, trust_remote_code, kwargs, task, classes, follows, folder
        )
        return prepare(put_adapter(model, folder))
    return _load_at(place, quantization_config, auto_class, trust_remote_code, kwargs, task, classes)


def _load_at(
    place: Place,
    quantization_config: HalfbyteConfig | None,
    auto_class: Any,
    trust_remote_code: bool,
    kwargs: dict[str, Any],
    task: Task = "lm",
    classes: Sequence[str] | None = None,
    head_follows: bool = False,
    adapter: Path | None = None,
) -> PreTrainedModel:
    config = None if place.gguf else config_at(place, trust_remote_code)
    packing = None if config is None else packing_of(config)
    if config is None or packing:
        kept, told = converted(place, packing, quantization_config, trust_remote_code)
        model = _load_at(kept, None, auto_class, trust_remote_code, kwargs, task, classes, head_follows, adapter)
        model.name_or_path = str(place.gguf or place.path)  # what adapters call their base
        model.rounded_again = told
        return model
    source = None if any(name in kwargs for name in OTHERS) else Source(place, trust_remote_code)
    if adapter and place.is_folder:
        check_base(adapter, source)  # before all is read
    if task != "lm" and auto_class is None:
        auto_class = check_task(config, task, place.path)
    else:
        task = "lm"
    if classes:
        set_classes(config, classes)
        kwargs = {"ignore_mismatched_sizes": True} | kwargs
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
        may_be_mapped = task == "lm" and place.is_folder and _stays_on_cpu(kwargs) and not is_watched()
        if may_be_mapped and is_too_large(place, quantization_config, free_memory()):
            kept = Place(str(shared(place, quantization_config, trust_remote_code)), True, {})
            logger.warning("%s would not fit into memory, so it is mapped from its copy in %s.", place.path, kept.path)
            model = _load_at(kept, None, auto_class, trust_remote_code, kwargs, adapter=adapter)
            model.name_or_path = model.config._name_or_path = place.path
            return model
    if place.is_folder and not any(name in kwargs for name in ELSEWHERE):
        files = weight_files(Path(place.path), getattr(config, "transformers_weights", None))
        kwargs.setdefault("use_safetensors", files[0].suffix == ".safetensors")
    with kept_failures(head_follows) as failures:
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
            raise InputError(sentence(f"The weights of {place.path} cannot be read: {error}")) from error
        except ValueError as error:
            say_remote_code(place.path, error)
            raise
    model.opened_from = source
    if task == "classify":
        hold_in_fp32(model)
    if held is not None and model.device.type == "cpu":
        _MAPPED[str(place.path)] = None
        native.tell_bus_error(
            f"Error: The weights of {' or '.join(_MAPPED)} can no longer be read: a file was changed while it was in "
            "use, or its disk fails. Restore it and start again; a run goes on from its last checkpoint.\n",
            2,  # as every input that cannot be used
        )
        paging.attach_if_needed(model)
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
    elif stacks := dense_stacks(model):
        logger.warning(
            "%s of %s (%d in all) holds experts in a form that is not known: they stay in %s.",
            stacks[0], place.path, len(stacks), str(model.dtype).removeprefix("torch."),
        )  # fmt: skip
    return model


def _stays_on_cpu(kwargs: dict[str, Any]) -> bool:
    """Whether a model is opened on the CPU as a whole, from its folder's own weights."""
    placed = kwargs.get("device_map", {"": "cpu"} if not torch.cuda.is_available() else None)
    everywhere = set(map(str, placed.values())) if isinstance(placed, dict) else {str(placed)}
    return everywhere == {"cpu"} and not any(name in kwargs for name in OTHERS)


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
        place = base_of_adapter(place)
    source, options = tokenizer_source(place.gguf) if place.gguf else (place.path, place.options)
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code, **options)
    except StrictDataclassError as error:  # the configuration says which tokenizer it is
        raise InputError(sentence(f"{Path(place.path) / CONFIG} cannot be used: {error}")) from error
    except (OSError, ValueError) as error:
        say_remote_code(place.path, error)
        if place.is_folder and not place.gguf and not any((Path(place.path) / name).is_file() for name in TOKENIZERS):
            message = (
                f"The folder {place.path} holds no tokenizer; copy tokenizer.json and tokenizer_config.json into it."
            )
        else:
            message = sentence(f"The tokenizer of {place.path} cannot be opened: {error}")
        raise InputError(message) from error


def base_of_adapter(place: Place) -> Place:
    """Return where the base model of the adapter in ``place`` is."""
    file = Path(place.path) / ADAPTER
    base = json_of(file).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise InputError(f"{file} does not name a base model (base_model_name_or_path): it is not a PEFT adapter.")
    try:
        return locate(base)
    except InputError as error:
        raise InputError(f"{file} names {base} as its base model, but it is not there. {error}") from error
