"""A base model as a folder in 4 or 8 bits that is mapped: one for all processes of a machine, or one beyond its memory.

Quantized while it is read, a base is memory of the process. Each of several processes would hold its own copy, N times
the largest part of a run's memory, and would do the same work N times; and one that does not fit would not be opened at
all. So there a 16-bit base is quantized once into a folder of the cache (:mod:`halfbyte.hf.models.converted`). The bits
are those that reading gives.
"""

from pathlib import Path

from halfbyte import devices, hf
from halfbyte.choices import SAVEABLE_TYPES
from halfbyte.hf.models.configs import ADAPTER, config_at
from halfbyte.hf.models.converted import is_too_large, shared
from halfbyte.hf.models.foreign.packed import packing_of
from halfbyte.hf.models.hub import locate
from halfbyte.hf.trainers import distributed
from halfbyte.runs.config import TrainConfig


def shared_base(config: TrainConfig, quantization: hf.HalfbyteConfig, free: int) -> str:
    """Return what the base model is to be loaded from: ``config.model``, or the folder that the processes share.

    Each process loads its own where one is alone on its machine and the base fits into the ``free`` bytes that there
    are, where the base is to stay in 16 bits, where the adapter begins with what quantization loses (``loftq``), and
    for classifiers and T5, which are small.

    Raises:
        InputError: the model cannot be quantized; all processes end with it.
    """
    apart = config.task != "lm" or config.init_lora_weights == "loftq" or config.quant_type not in SAVEABLE_TYPES
    if apart or (distributed.on_this_machine() == 1 and not _is_too_large(config, quantization, free)):
        return config.model
    with distributed.first_writes(distributed.is_first_here()) as writes:
        folder = _shared(config, quantization) if writes else None
    folder = folder or _shared(config, quantization)
    return str(folder)


def _is_too_large(config: TrainConfig, quantization: hf.HalfbyteConfig, free: int) -> bool:
    place = locate(config.model)
    is_16_bit = place.is_folder and not place.gguf and not (Path(place.path) / ADAPTER).is_file()
    if not is_16_bit or devices.choose(config.device).type != "cpu":
        return False
    found = config_at(place, config.trust_remote_code)
    held = packing_of(found) or getattr(found, "quantization_config", None)
    return held is None and is_too_large(place, quantization, free)


def _shared(config: TrainConfig, quantization: hf.HalfbyteConfig) -> Path | str:
    place = locate(config.model)
    if place.gguf or (Path(place.path) / ADAPTER).is_file():
        return config.model  # kept in the cache already; refused later
    found = config_at(place, config.trust_remote_code)
    if packing_of(found) or getattr(found, "quantization_config", None) is not None:
        return config.model
    return shared(place, quantization, config.trust_remote_code)
