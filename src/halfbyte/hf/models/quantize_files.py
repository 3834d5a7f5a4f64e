"""Write a copy of a model of any size in 4 or 8 bits: its files are read and written tensor by tensor.

The model is built without memory (on the meta device) to learn which tensors are weights of linear layers; then every
tensor of the source's safetensors files is read, quantized if it is one of those (or else cast to the compute dtype),
and written. In memory are one tensor of the source and what was made of it. Who was interrupted or killed goes on with
the same command, from the last file of a gigabyte that was whole; what its tensors were lies beside it until the end.
"""

import json
import logging
import math
import shutil
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.utils import httpx  # type: ignore[attr-defined]
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from halfbyte import __version__
from halfbyte.choices import SAVEABLE_TYPES
from halfbyte.errors import InputError, check_room
from halfbyte.files import absolute, growing_folder, repair, stamp, write_text
from halfbyte.hf.layers.stacks import take_apart
from halfbyte.hf.models.apart import apart
from halfbyte.hf.models.check import Names, check_finite, check_weights
from halfbyte.hf.models.checkpoint import Checkpoint, Tensors, weight_files
from halfbyte.hf.models.config import HalfbyteConfig
from halfbyte.hf.models.configs import config_at, model_class
from halfbyte.hf.models.fingerprint import FILE as FINGERPRINT
from halfbyte.hf.models.fingerprint import Fingerprint, Row, Rows, dense_digests, times
from halfbyte.hf.models.foreign.gguf import tokenizer_source
from halfbyte.hf.models.foreign.gguf_mixture import gguf_tensors
from halfbyte.hf.models.foreign.packed import QUANTIZE_CONFIG, Packing, packing_of, unpacked
from halfbyte.hf.models.hub import Place, locate
from halfbyte.hf.models.linears import is_linear, is_subclass
from halfbyte.hf.models.quantizer import HalfbyteQuantizer, dense_dtype, quantized
from halfbyte.hf.models.shards import write_shards
from halfbyte.locks import Locked
from halfbyte.memory import give_back_freed
from halfbyte.nn import QuantizedLinear

logger = logging.getLogger(__name__)

WEIGHTS = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")

LEFT_OUT = (*WEIGHTS, QUANTIZE_CONFIG, FINGERPRINT)

FREED = 16 << 20
"""After so many bytes of tensors, what the heap holds of them beyond use is given back."""
ROWS = 64
"""Of a weight, so many are compared at once."""
BESIDE = ".seen.json"
"""Ends the name of what was seen of a file's tensors, while the folder grows."""


@dataclass(frozen=True)
class QuantizedCopy:
    """What was written.

    Attributes:
        values: of the model's tensors.
        packed: those of them in 4 or 8 bits.
        bytes_before: of the source's weight files.
        bytes_after: of the copy's.
        error: of a source that was quantized otherwise (GGUF, GPTQ, AWQ, MXFP4): how far the copy's weights are from
            the source's, ``‖W' − W‖ / ‖W‖``; None of a dense one.
    """

    values: int
    packed: int
    bytes_before: int
    bytes_after: int
    error: float | None = None

    @property
    def share(self) -> float:
        """The part of the values that is quantized."""
        return self.packed / self.values


def quantize_checkpoint(
    model: str | Path,
    output: str | Path,
    config: HalfbyteConfig | None = None,
    *,
    finish: Callable[[Path], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> QuantizedCopy:
    """Write ``model`` in 4 or 8 bits to the folder ``output``, which appears whole or not at all.

    transformers with bitsandbytes opens the folder too, where its format has a name for the number format
    (:attr:`HalfbyteConfig.is_bitsandbytes`), except where a linear layer's class is one of the family's own (Falcon),
    which they leave dense; a warning is logged then.

    Args:
        model: a folder or hub id with weights in 16 or 32 bits, or in GPTQ's, AWQ's or MXFP4's; or a GGUF file.
        output: the new folder.
        config: how to quantize; None takes the defaults.
        finish: adds to the folder before it appears.
        progress: called with tensors done and tensors in all.
        overwrite: replace a folder that is there already.
        trust_remote_code: run code that comes with the model.

    Returns:
        What was written: sizes, and how many of the values are quantized.

    Raises:
        InputError: there is no such model, its weights are damaged or not those that its configuration describes, none
            can be quantized, it is quantized already, ``output`` is there, or ``quant_type`` is ``none``.
    """
    config = config or HalfbyteConfig()
    output = absolute(output)
    if config.quant_type not in SAVEABLE_TYPES:
        raise InputError(
            f"A copy with quant_type {config.quant_type} would be the model itself; choose one of "
            f"{', '.join(SAVEABLE_TYPES)}."
        )
    repair(output)
    if output.exists() and not overwrite:
        raise InputError(f"{output} is there already; choose another folder or overwrite it (--overwrite).")
    if output.exists() and not (output / "config.json").is_file():
        raise InputError(f"{output} holds no model that could be overwritten; choose another folder.")
    place = locate(model)
    model_config = config_at(place, trust_remote_code)
    packing = packing_of(model_config)
    if packing is None and getattr(model_config, "quantization_config", None) is not None:
        raise InputError(f"{model} is quantized already; start from its 16-bit original.")
    source = on_disk(place)
    if output.resolve() == source.resolve():
        raise InputError(f"The output folder {output} is the model's own; choose another.")
    model_config.__dict__.pop("quantization_config", None)
    skeleton = skeleton_of(model_config, config.compute_dtype, trust_remote_code)
    checkpoint = tensors_of(place, source, model_config, skeleton, packing)
    check_weights(skeleton, checkpoint, pre_quantized=False)
    shapes = shapes_of(skeleton)
    quantizer = HalfbyteQuantizer(config, pre_quantized=False)
    own = {type(module).__name__ for module in skeleton.modules() if is_subclass(module) and is_linear(module)}
    quantizer.preprocess_model(skeleton)
    plan = Plan(skeleton, checkpoint)
    if not plan.layers:
        raise InputError(
            f"{type(skeleton).__name__} puts every linear layer together from several tensors of the checkpoint, "
            "so none can be quantized by itself; open it with halfbyte.load and save it with save_pretrained."
        )

    tensors = _Made(plan, checkpoint, shapes, quantizer.quantization_config, bool(packing or place.gguf))
    sizes = tensors.sizes()
    check_room(output, sum(sizes.values()), "The copy")
    key = {"version": __version__, "config": config.to_dict(), "source": stamp(place.gguf or source)}
    try:
        with growing_folder(output, json.dumps(key, default=str)) as folder, tensors:
            write_shards(folder, sizes, tensors.make, progress, tensors.leave)
            about = tensors.all(folder)
            copy_others(place, source, folder)
            skipped = quantizer.quantization_config
            skipped.skip_modules = sorted({*(skipped.skip_modules or []), *plan.left_dense})
            model_config.quantization_config = skipped
            model_config.dtype = str(config.compute_dtype).removeprefix("torch.")
            model_config.save_pretrained(folder)
            fingerprint = Fingerprint(type(skeleton).__name__, about.rows).called(str(place.gguf or model))
            replace(fingerprint, files=times(folder.glob("*.safetensors"))).save(folder)
            if finish:
                finish(folder)
    except Locked as error:
        raise InputError(f"{output} is being written by another process; wait for it, or choose another.") from error
    if own:
        logger.warning(
            "%s opens with halfbyte only: transformers with bitsandbytes leaves %s dense.", output, " and ".join(own)
        )
    before, after = (
        sum(file.stat().st_size for file in files) for files in (checkpoint.files, output.glob("*.safetensors"))
    )
    return QuantizedCopy(about.values, about.packed, before, after, about.error if packing or place.gguf else None)


@dataclass
class _About:
    """What was seen of the tensors of a file, or of all.

    Attributes:
        values: of the tensors.
        packed: those of them in 4 or 8 bits.
        apart: of a source that was quantized otherwise, ``‖W' − W‖²`` over its weights.
        size: ``‖W‖²`` of the same.
        rows: of the fingerprint.
    """

    values: int = 0
    packed: int = 0
    apart: float = 0.0
    size: float = 0.0
    rows: dict[str, Row] = field(default_factory=dict)

    @property
    def error(self) -> float:
        """How far the weights are from the source's, relatively."""
        return math.sqrt(self.apart / max(self.size, 1e-30))

    def save(self, file: Path) -> None:
        """Write it."""
        sums = {"values": self.values, "packed": self.packed, "apart": self.apart, "size": self.size}
        write_text(file, json.dumps(sums | {"rows": Fingerprint("", self.rows).to_json()}))

    def add(self, file: Path) -> None:
        """Add what :meth:`save` wrote."""
        about = json.loads(file.read_text(encoding="utf-8"))
        self.values += about["values"]
        self.packed += about["packed"]
        self.apart += about["apart"]
        self.size += about["size"]
        self.rows |= Fingerprint.from_json(about["rows"]).rows


class _Made:
    """Makes the tensors of the copy, and keeps what was seen of them beside the files. A context manager.

    Args:
        plan: what becomes of the source's tensors.
        checkpoint: they.
        shapes: of the model's own, before any is quantized.
        config: how they are quantized.
        measured: whether the error is of interest.
    """

    def __init__(
        self,
        plan: "Plan",
        checkpoint: Tensors,
        shapes: dict[str, torch.Size],
        config: HalfbyteConfig,
        measured: bool,
    ) -> None:
        self._plan, self._checkpoint, self._shapes = plan, checkpoint, shapes
        self._config, self._measured = config, measured
        self._places = dict(plan.places(shapes))
        self._about = _About()
        self._rows = Rows()
        self._read = 0

    def sizes(self) -> dict[str, int]:
        """Return about how many bytes each tensor will have."""
        return {name: self._size(name) for name in self._plan.names}

    def _size(self, name: str) -> int:
        values = self._checkpoint.form(name).numel()
        if name not in self._plan.layers:
            return values * self._plan.dtype_of(name).itemsize
        return values * (self._config.bits or 16) // 8 + values // 16  # with the constants of each block

    def make(self, name: str) -> dict[str, Tensor]:
        """Return what the files have for the tensor ``name`` of the source.

        Raises:
            InputError: a value is not finite.
        """
        if self._read >= FREED:
            give_back_freed()
            self._read = 0
        plan, tensor = self._plan, self._checkpoint.read(name)
        self._read += tensor.nbytes
        self._about.values += tensor.numel()
        layer = plan.layers.get(name)
        made: dict[str, Tensor]
        if layer is not None:
            weight = quantized(name, tensor.to(self._config.compute_dtype), layer, self._config)
            made = weight.state_dict(name)
            if self._measured:
                exact = tensor.T if layer.transposed else tensor
                made_of = weight.dequantize(torch.float32)
                for ours, theirs in zip(torch.split(made_of, ROWS), torch.split(exact, ROWS), strict=True):
                    self._about.apart += float((ours - theirs).square().sum())
                    self._about.size += float(theirs.float().square().sum())
            self._about.packed += tensor.numel()
            digested: list[dict[str, Tensor] | Tensor] = [made]
        else:
            kept = tensor.to(plan.dtype_of(name)) if tensor.is_floating_point() else tensor
            check_finite(name, kept)
            made, digested = {name: kept}, [kept]
        if target := self._places.get(name):
            shape = self._shapes.get(target, tensor.shape)
            self._rows.add(target, shape, partial(dense_digests, tensor, name, digested))
        return made

    def leave(self, file: Path) -> None:
        """Leave beside a file what was seen of its tensors."""
        replace(self._about, rows=self._rows.taken()).save(file.with_name(f"{file.name}{BESIDE}"))
        self._about = _About()

    def all(self, folder: Path) -> _About:
        """Return what was seen of all tensors, and remove what tells."""
        about = _About()
        for file in sorted(folder.glob(f"*{BESIDE}")):
            about.add(file)
            file.unlink()
        about.rows = dict(sorted(about.rows.items()))
        return about

    def __enter__(self) -> "_Made":
        self._rows.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._rows.__exit__(*error)


def copy_others(place: Place, source: Path, folder: Path, but: Sequence[str] = ()) -> None:
    """Copy what a model has beside weights: configuration, tokenizer, code, licence; of a GGUF file the tokenizer.

    Args:
        place: of the model.
        source: its folder.
        folder: to copy to.
        but: files that are left out.
    """
    if place.gguf:
        path, options = tokenizer_source(place.gguf)
        AutoTokenizer.from_pretrained(path, **options).save_pretrained(folder)
        return
    for file in source.iterdir():
        if file.is_file() and not file.name.endswith((*LEFT_OUT, *but)) and not file.name.startswith("."):
            shutil.copy(file, folder)


def on_disk(place: Place) -> Path:
    """Return the folder of the model in ``place``, downloaded from the hub unless it is there.

    Raises:
        InputError: it cannot be downloaded.
    """
    if place.is_folder:
        return Path(place.path)
    try:
        return Path(snapshot_download(place.path, **place.options))
    except (OSError, httpx.TransportError) as error:
        first = str(error).strip().split("\n")[0]
        raise InputError(f"The model {place.path} cannot be downloaded: {first}") from error


def skeleton_of(
    config: Any, dtype: torch.dtype, trust_remote_code: bool = False, auto_class: Any = None
) -> PreTrainedModel:
    """Return the model of ``config`` without memory, its experts apart.

    ``auto_class`` is another class than its architecture names.
    """
    cls = auto_class or model_class(config)
    with torch.device("meta"):
        if issubclass(cls, PreTrainedModel):
            model: PreTrainedModel = cls._from_config(config, dtype=dtype)
        else:
            model = cls.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    take_apart(model)
    return model


def tensors_of(place: Place, folder: Path, config: Any, skeleton: PreTrainedModel, packing: Packing | None) -> Tensors:
    """Return the tensors of a model's files: of GGUF, GPTQ, AWQ and MXFP4 as those of the dense model.

    Args:
        place: of the model.
        folder: its, as :func:`on_disk` returns it.
        config: its.
        skeleton: its, without memory; stacks of experts are taken apart as it has them.
        packing: how its weights are packed (:func:`halfbyte.hf.models.foreign.packed.packing_of`).

    Raises:
        InputError: the files are not whole.
    """
    if place.gguf:
        return gguf_tensors(place.gguf, skeleton)
    held = Checkpoint(weight_files(folder, getattr(config, "transformers_weights", None)))
    return apart(unpacked(held, packing) if packing else held, skeleton)


def shapes_of(skeleton: PreTrainedModel) -> dict[str, torch.Size]:
    """Return the shapes of a dense model's tensors."""
    return {name: x.shape for name, x in skeleton.state_dict().items()}


class Plan:
    """What becomes of a checkpoint's tensors.

    Attributes:
        names: those that are written: all but copies of a tied weight.
        layers: the layer whose 4-bit weight a tensor becomes.
        left_dense: layers whose weight is made of several tensors, or a part of one: not quantized here.
        put_together: the tensors of which, with others or in part, one of the model's is made.
        target: what each tensor is called in the model.
    """

    def __init__(self, skeleton: PreTrainedModel, checkpoint: Tensors) -> None:
        self.skeleton = skeleton
        self.layers: dict[str, QuantizedLinear] = {}
        self.left_dense: set[str] = set()
        modules = {n: m for n, m in skeleton.named_modules() if isinstance(m, QuantizedLinear)}
        rules = Names(skeleton)
        renamed = {name: rules.of(name) for name in checkpoint.names}
        self.target = {name: target for name, (target, _) in renamed.items()}
        self.put_together = {name for name, (_, converter) in renamed.items() if converter is not None}
        for name, (target, converter) in renamed.items():
            module = target.removesuffix(".weight")
            if not target.endswith(".weight") or module not in modules:
                continue
            if converter is None:
                self.layers[name] = modules[module]
            else:
                self.left_dense.add(module)
        origin = {target: name for name, target in self.target.items()}
        tied = {
            origin[target]: origin[source]
            for target, source in skeleton.all_tied_weights_keys.items()
            if target in origin and source in origin
        }
        self.names = [
            name
            for name in checkpoint.names
            if name not in tied or not torch.equal(checkpoint.read(name), checkpoint.read(tied[name]))
        ]

    def places(self, shapes: Container[str]) -> Iterator[tuple[str, str]]:
        """Yield the tensors that the model has a place for, each with the name of that: what makes a model what it is.

        A tensor that is put together with others goes by its own name, and of tied weights that which is there goes by
        the name of the one that it would follow.

        Args:
            shapes: the names of the model's own tensors.
        """
        tied = self.skeleton.all_tied_weights_keys
        there = {self.target[name] for name in self.names}
        for name in self.names:
            target = self.target[name]
            if name in self.put_together:
                yield name, name
            elif target in shapes:
                yield name, tied[target] if target in tied and tied[target] not in there else target

    def dtype_of(self, name: str) -> torch.dtype:
        """Return the dtype in which a floating tensor that stays dense is kept."""
        return dense_dtype(self.skeleton, self.target[name], self.skeleton.dtype)
