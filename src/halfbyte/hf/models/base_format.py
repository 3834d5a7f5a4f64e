"""The number format of the base that an adapter was trained over, kept beside the adapter.

``adapter_config.json`` names the base model, which lies in 16 bits as a rule, and not how it was held. Over another
format than that of training the adapter corrects other errors. The file is written where the format is not the default.
"""

import json
from pathlib import Path

from halfbyte.errors import InputError
from halfbyte.files import write_text
from halfbyte.hf.models.config import HalfbyteConfig

FILE = "base_format.json"


def save_base_format(config: HalfbyteConfig, folder: Path) -> None:
    """Write what ``config`` says into the folder of an adapter, unless the numbers' format is the default."""
    usual = HalfbyteConfig(compute_dtype=config.compute_dtype)
    if _named(config) != _named(usual):
        write_text(folder / FILE, json.dumps(_named(config), indent=2) + "\n")


def base_format(folder: Path) -> HalfbyteConfig | None:
    """Return the format of the base that the adapter in ``folder`` was trained over; None where that is the default.

    Raises:
        InputError: the file does not say one.
    """
    file = folder / FILE
    if not file.is_file():
        return None
    try:
        return HalfbyteConfig(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{file} does not say how the base model is held ({error}); copy it again.") from error


def _named(config: HalfbyteConfig) -> dict[str, object]:
    return {
        "quant_type": config.quant_type,
        "blocksize": config.blocksize,
        "double_quant": config.double_quant,
        "compute_dtype": str(config.compute_dtype).removeprefix("torch."),
    }
