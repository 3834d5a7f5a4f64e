"""Write a 4-bit copy of a model of any size: its files are read and written tensor by tensor.

The model is built without memory (on the meta device) to learn which tensors are weights of linear layers; then every
tensor of the source's safetensors files is read, quantized if it is one of those (or else cast to the compute dtype),
and written. At no time is more in memory than one shard of the output and one tensor of the source.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from halfbyte.choices import SAVEABLE_TYPES
from halfbyte.errors import InputError
from halfbyte.files import whole_folder
from halfbyte.hf.models.config import HalfbyteConfig
from halfbyte.hf.models.loader import model_class, read_config
from halfbyte.hf.models.quantizer import HalfbyteQuantizer, dense_dtype
from halfbyte.nn import Linear4bit
from halfbyte.quant import quantize_4bit

SHARD_BYTES = 1 << 30
INDEX = "model.safetensors.index.json"
WEIGHTS = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")


def quantize_checkpoint(
    model: str,
    output: str | Path,
    config: HalfbyteConfig | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> None:
    """Write ``model`` in bitsandbytes' 4-bit format to the folder ``output``, which appears whole or not at all.

    Args:
        model: a folder or hub id with safetensors weights in 16 or 32 bits.
        output: the new folder.
        config: how to quantize; None takes the defaults.
        progress: called with tensors done and tensors in all.
        overwrite: replace a folder that is there already.
        trust_remote_code: run code that comes with the model.

    Raises:
        InputError: there is no such model, it holds no safetensors, it is quantized already, ``output`` is there, or
            the format has no name for the codebook.
    """
    config = config or HalfbyteConfig()
    output = Path(output)
    if config.quant_type not in SAVEABLE_TYPES:
        raise InputError(
            f"A {config.quant_type} model cannot be saved: bitsandbytes' format has {' and '.join(SAVEABLE_TYPES)} "
            "only."
        )
    if output.exists() and not overwrite:
        raise InputError(f"{output} is there already; choose another folder or overwrite it (--overwrite).")
    if output.exists() and not (output / "config.json").is_file():
        raise InputError(f"{output} holds no model that could be overwritten; choose another folder.")
    model_config = read_config(model, trust_remote_code)
    if getattr(model_config, "quantization_config", None) is not None:
        raise InputError(f"{model} is quantized already; start from its 16-bit original.")
    source = Path(model) if Path(model).is_dir() else Path(snapshot_download(model))
    if output.resolve() == source.resolve():
        raise InputError(f"The output folder {output} is the model's own; choose another.")
    files = _weight_files(source)

    quantizer = HalfbyteQuantizer(config, pre_quantized=False)
    with torch.device("meta"):
        skeleton = model_class(model_config)._from_config(model_config, dtype=config.compute_dtype)
    quantizer.preprocess_model(skeleton)
    plan = _Plan(skeleton)

    with whole_folder(output) as folder:
        for file in source.iterdir():
            if file.is_file() and not file.name.endswith(WEIGHTS) and not file.name.startswith("."):
                shutil.copy(file, folder)
        writer = _ShardWriter(folder)
        keys = {file: list(_open(file).keys()) for file in files}
        total = sum(len(names) for names in keys.values())
        done = 0
        for file, names in keys.items():
            with _open(file) as tensors:
                for name in names:
                    tensor = tensors.get_tensor(name)
                    layer = plan.layer_of(name)
                    if layer is not None:
                        dense = tensor.T if layer.transposed else tensor
                        weight = quantize_4bit(
                            dense.to(config.compute_dtype), config.quant_type, config.blocksize, config.double_quant
                        )
                        writer.add(weight.state_dict(name))
                    else:
                        writer.add({name: tensor.to(plan.dtype_of(name)) if tensor.is_floating_point() else tensor})
                    done += 1
                    if progress:
                        progress(done, total)
        writer.close()
        skipped = quantizer.quantization_config
        skipped.skip_modules = sorted({*(skipped.skip_modules or []), *plan.left_dense})
        model_config.quantization_config = skipped
        model_config.dtype = str(config.compute_dtype).removeprefix("torch.")
        model_config.save_pretrained(folder)


class _Plan:
    """Which of a checkpoint's tensors become 4-bit weights, by transformers' (5.23) own rules for their names."""

    def __init__(self, skeleton: Any) -> None:
        transforms = get_model_conversion_mapping(skeleton)
        self.renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
        self.converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
        self.skeleton = skeleton
        self.meta = skeleton.state_dict()
        self.layers = {n: m for n, m in skeleton.named_modules() if isinstance(m, Linear4bit)}
        # Layers whose weight is made of several tensors of the checkpoint, or a part of one: not quantized here.
        self.left_dense: set[str] = set()

    def _renamed(self, name: str) -> tuple[str, str | None]:
        renamed: tuple[str, str | None] = rename_source_key(
            name, self.renamings, self.converters, self.skeleton.base_model_prefix, self.meta
        )
        return renamed

    def layer_of(self, name: str) -> Linear4bit | None:
        """Return the layer whose 4-bit weight the tensor ``name`` becomes, if any."""
        renamed, converter = self._renamed(name)
        module = renamed.removesuffix(".weight")
        if not renamed.endswith(".weight") or module not in self.layers:
            return None
        if converter is not None:
            self.left_dense.add(module)
            return None
        return self.layers[module]

    def dtype_of(self, name: str) -> torch.dtype:
        """Return the dtype in which a floating tensor that stays dense is kept."""
        return dense_dtype(self.skeleton, self._renamed(name)[0], self.skeleton.dtype)


class _ShardWriter:
    """Collects tensors and writes a safetensors file whenever a shard's worth has come together."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shards: list[list[str]] = []
        self.tensors: dict[str, Tensor] = {}
        self.total = 0

    def add(self, tensors: dict[str, Tensor]) -> None:
        """Take ``tensors`` into the shard at hand, or the next one if they do not fit."""
        size = sum(tensor.nbytes for tensor in tensors.values())
        if self.tensors and sum(tensor.nbytes for tensor in self.tensors.values()) + size > SHARD_BYTES:
            self._flush()
        self.tensors |= tensors
        self.total += size

    def _flush(self) -> None:
        save_file(
            {name: tensor.contiguous() for name, tensor in self.tensors.items()},
            self.folder / f"shard-{len(self.shards)}",
            metadata={"format": "pt"},
        )
        self.shards.append(list(self.tensors))
        self.tensors = {}

    def close(self) -> None:
        """Write what is left, and give the files their final names and, if there are several, an index."""
        self._flush()
        count = len(self.shards)
        names = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
        if count == 1:
            names = ["model.safetensors"]
        for i, name in enumerate(names):
            (self.folder / f"shard-{i}").rename(self.folder / name)
        if count > 1:
            weight_map = {key: name for name, keys in zip(names, self.shards, strict=True) for key in keys}
            index = {"metadata": {"total_size": self.total}, "weight_map": weight_map}
            (self.folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True), encoding="utf-8")


def _weight_files(source: Path) -> list[Path]:
    index = source / INDEX
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        files = [source / name for name in names]
    else:
        files = [source / "model.safetensors"]
    for file in files:
        if not file.is_file():
            raise InputError(f"{file} is missing: only models with safetensors weights can be quantized.")
    return files


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file} cannot be read ({error}): the file is damaged or incomplete.") from error
