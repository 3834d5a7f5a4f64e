"""How large a checkpoint is, from the headers of its safetensors files: no weight is read."""

import dataclasses
import math
from pathlib import Path

from huggingface_hub import snapshot_download
from safetensors import safe_open


@dataclasses.dataclass(frozen=True)
class Size:
    """What a checkpoint's safetensors files hold.

    Attributes:
        elements: in all tensors; for a model that is not quantized, its parameters.
        bytes: of the files.
    """

    elements: int
    bytes: int


def checkpoint_size(model: str | Path) -> Size:
    """Return the size of a model folder, or of a hub id that has been downloaded."""
    folder = Path(model) if Path(model).is_dir() else Path(snapshot_download(str(model), local_files_only=True))
    files = list(folder.glob("model*.safetensors"))
    elements = 0
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            names = list(tensors.keys())
            elements += sum(math.prod(tensors.get_slice(name).get_shape()) for name in names)
    return Size(elements, sum(file.stat().st_size for file in files))
