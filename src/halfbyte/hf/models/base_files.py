"""The fingerprint of the base model in a folder: read where it is stored, kept in the cache once it was made.

    dense, GGUF, GPTQ, AWQ, MXFP4    made of all values; what they are quantized to, for each format that is asked for
    4 or 8 bits, by halfbyte         stored in the folder, with the digests of what was read; where its files are not as
                                     they were written (a copy, a changed byte), made of them, and what is stored holds
                                     if that agrees
    4 or 8 bits, by others           made of codes, block constants and dense tensors

What was made lies in ``fingerprints`` of the cache, under the folder's path, and holds as long as names, sizes and
times of the files do. So opening a model reads no weights for it but the first time.
"""

import contextlib
import functools
import hashlib
import json
import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from torch import Tensor
from transformers import PreTrainedModel

from halfbyte.choices import BITSANDBYTES_TYPES
from halfbyte.errors import InputError, size_text
from halfbyte.files import cache_folder, model_path, write_text
from halfbyte.hf.models.check import part_of
from halfbyte.hf.models.checkpoint import Tensors, weight_files
from halfbyte.hf.models.config import HalfbyteConfig
from halfbyte.hf.models.configs import ADAPTER, CONFIG, config_at, json_of
from halfbyte.hf.models.fingerprint import (
    DENSE,
    FILE,
    Fingerprint,
    Row,
    Rows,
    dense_digests,
    quantized_digests,
    rounded_digest,
    times,
)
from halfbyte.hf.models.foreign.packed import packing_of
from halfbyte.hf.models.hub import Place
from halfbyte.hf.models.quantize_files import Plan, shapes_of, skeleton_of, tensors_of
from halfbyte.hf.models.quantizer import HalfbyteQuantizer, dense_dtype, quantized

logger = logging.getLogger(__name__)

COMPUTE = torch.bfloat16
"""Of a model without memory; nothing here depends on it."""
SAID = 1 << 30
"""Bytes of weights from which on it is said that they are read."""

Stamp = list[list[Any]]
"""Of each file name, size, and times of change of content and of the file, in nanoseconds."""


@dataclass(frozen=True)
class Source:
    """Where an opened model was read from.

    Attributes:
        place: its files.
        trust_remote_code: whether code that comes with it may run.
    """

    place: Place
    trust_remote_code: bool = False


def check_base(folder: Path, source: Source | None) -> bool:
    """Hold a base model to be that which the adapter in ``folder`` was trained on.

    Args:
        folder: the adapter's.
        source: of the base; None where it came from no files that are known.

    Returns:
        Whether it is known to be: False where adapter or base have no fingerprint, or no form in common.

    Raises:
        InputError: it is another one.
    """
    trained = Fingerprint.of_adapter(folder)
    if trained is None or source is None:
        return False
    given = fingerprint(source, () if DENSE in trained.digests else formats_of(trained))
    if given is None:
        return False
    found = trained.difference(given)
    if found is None:
        return trained.knows(given)
    place = source.place.gguf or source.place.path
    named = _named_base(folder)
    same = Path(trained.model).name == Path(place).name and named is not None and _is_at(named, Path(place))
    whose = f"The base model {place} is not what it was when the adapter {folder} was trained on it"
    other = f"The adapter {folder} was trained on another base model ({trained.model}) than {place}"
    remedy = "put its files back" if same else "use it with that one"
    raise InputError(f"{whose if same else other}: {found}; {remedy}, or remove its {FILE} to have no base compared.")


def fingerprint(source: Source, formats: Collection[HalfbyteConfig] = ()) -> Fingerprint | None:
    """Return the fingerprint of a base model, made unless it is stored or kept; None where its files are not here.

    Args:
        source: where it lies.
        formats: of a dense model, what is to be known of it when it is quantized so, too.

    Raises:
        InputError: it cannot be read.
    """
    home = _home(source.place)
    if home is None:
        return None
    files = _files(home)
    wanted = {name: form for form in formats if (name := _format_name(form))}
    stamp = _stamp([*files, home / CONFIG] if home.is_dir() else files)
    keeper = _keeper(home)
    known, tried = _kept(keeper, stamp)
    if known is None:
        known = _stored(home, files)
    if known is not None and (tried is None or wanted.keys() <= tried):
        return known
    size = sum(file.stat().st_size for file in files)
    if size >= SAID:
        logger.warning("%s is read once for its fingerprint (%s), which is kept.", home, size_text(size))
    asked = {name: form for name, form in wanted.items() if name not in (tried or ())}
    made, is_dense = _made(source, home, list(asked.values()))
    made = made if known is None else _joined(known, made)
    _keep(keeper, stamp, made, (tried or set()) | asked.keys() if is_dense else None)
    return made


def formats_of(known: Fingerprint) -> list[HalfbyteConfig]:
    """Return the number formats that a fingerprint has digests of, of those that bitsandbytes' files have names for."""
    found = {}
    for kind in known.digests:
        name, *numbers = kind.split("-")
        if name in BITSANDBYTES_TYPES:
            blocksize, dtype, *more = numbers
            found[name, blocksize, dtype] = HalfbyteConfig(name, int(blocksize), "single" not in more, dtype)
    return list(found.values())


def _format_name(form: HalfbyteConfig) -> str:
    """Return the name of a format of which others have folders too; none of another one."""
    if form.quant_type not in BITSANDBYTES_TYPES:
        return ""
    dtype = str(form.compute_dtype).removeprefix("torch.")
    return f"{form.quant_type}-{form.blocksize}-{dtype}-{'double' if form.double_quant else 'single'}"


def _is_at(model: str, place: Path) -> bool:
    return Path(model_path(model)).resolve() == place.resolve()


def _named_base(folder: Path) -> str | None:
    name = json_of(folder / ADAPTER).get("base_model_name_or_path") if (folder / ADAPTER).is_file() else None
    return name if isinstance(name, str) else None


def _home(place: Place) -> Path | None:
    """Return the folder or the GGUF file; of a hub id what was downloaded, or None."""
    if place.gguf:
        return place.gguf
    if place.is_folder:
        return Path(place.path)
    found = try_to_load_from_cache(place.path, CONFIG)
    return Path(found).parent if isinstance(found, str) else None


def _files(home: Path) -> list[Path]:
    return [home] if home.is_file() else weight_files(home, json_of(home / CONFIG).get("transformers_weights"))


def _stamp(files: Iterable[Path]) -> Stamp:
    held = ((file.name, file.stat()) for file in files)
    return [[name, about.st_size, about.st_mtime_ns, about.st_ctime_ns] for name, about in held]


def _keeper(home: Path) -> Path:
    path = home.resolve()
    digest = hashlib.sha256(str(path).encode()).hexdigest()[:16]
    return cache_folder() / "fingerprints" / f"{path.stem if path.is_file() else path.name}-{digest}.json"


def _kept(keeper: Path, stamp: Stamp) -> tuple[Fingerprint | None, set[str] | None]:
    """Return what the cache holds of files with this stamp, and which formats were asked for of dense ones."""
    try:
        text = keeper.read_text(encoding="utf-8")
    except OSError:
        return None, None
    return _read(text, json.dumps(stamp))


@functools.lru_cache(maxsize=8)
def _read(text: str, stamp: str) -> tuple[Fingerprint | None, set[str] | None]:
    with contextlib.suppress(ValueError, KeyError, TypeError):
        about = json.loads(text)
        if json.dumps(about["stamp"]) == stamp:
            formats = about["formats"]
            return Fingerprint.from_json(about["fingerprint"]), None if formats is None else set(formats)
    return None, None


def _keep(keeper: Path, stamp: Stamp, made: Fingerprint, formats: Iterable[str] | None) -> None:
    asked = None if formats is None else sorted(formats)
    about = {"stamp": stamp, "formats": asked, "fingerprint": made.to_json()}
    try:
        write_text(keeper, json.dumps(about))
    except OSError as error:
        logger.warning("The fingerprint of a base model cannot be kept (%s), so it is made anew each time.", error)


def _stored(home: Path, files: list[Path]) -> Fingerprint | None:
    """Return what is stored in the folder, if its weights are as they were when that was written."""
    claim = _claim(home)
    return claim if claim is not None and dict(claim.files) == times(files) else None


def _claim(home: Path) -> Fingerprint | None:
    with contextlib.suppress(OSError, ValueError):
        claim = Fingerprint.from_json((home / FILE).read_text(encoding="utf-8"))
        return claim if claim.files else None
    return None


def _made(source: Source, home: Path, formats: list[HalfbyteConfig]) -> tuple[Fingerprint, bool]:
    """Return the fingerprint of files that are read, and whether they are dense."""
    config = config_at(source.place, source.trust_remote_code)
    packing = None if source.place.gguf else packing_of(config)
    held = config.__dict__.pop("quantization_config", None)
    model = skeleton_of(config, COMPUTE, source.trust_remote_code)
    checkpoint = tensors_of(source.place, home, config, model, packing)
    name = type(model).__name__
    if held is None or packing:
        return Fingerprint(name, _dense_rows(model, checkpoint, formats)), True
    claim = _claim(home)
    made = Fingerprint(name, _quantized_rows(model, checkpoint, theirs=claim is None))
    return (made if claim is None or not _agree(claim, made) else claim), False


def _agree(claim: Fingerprint, made: Fingerprint) -> bool:
    """Whether what is stored says of a folder's tensors what they are."""
    return claim.rows.keys() == made.rows.keys() and all(
        claim.rows[name].shape == row.shape and row.digests.items() <= claim.rows[name].digests.items()
        for name, row in made.rows.items()
    )


def _joined(known: Fingerprint, more: Fingerprint) -> Fingerprint:
    return replace(known, rows={name: _with(row, more.rows[name].digests) for name, row in known.rows.items()})


def _with(row: Row, more: Mapping[str, str]) -> Row:
    return Row(row.shape, {**row.digests, **more})


def _dense_rows(model: PreTrainedModel, checkpoint: Tensors, formats: list[HalfbyteConfig]) -> dict[str, Row]:
    """Return the rows of a dense model, with what its tensors become in ``formats``."""
    shapes = shapes_of(model)
    if formats:
        HalfbyteQuantizer(formats[0], pre_quantized=False).preprocess_model(model)
    plan = Plan(model, checkpoint)
    with Rows() as rows:
        for name, target in plan.places(shapes):
            x, layer = checkpoint.read(name), plan.layers.get(name)
            made: list[dict[str, Tensor] | Tensor] = []
            for form in formats:
                if layer is not None:
                    made.append(quantized(name, x.to(form.compute_dtype), layer, form).state_dict(name))
                elif x.is_floating_point():
                    made.append(x.to(dense_dtype(model, target, form.compute_dtype)))
            rows.add(target, shapes.get(target, x.shape), functools.partial(dense_digests, x, name, made))
        return rows.all()


def _quantized_rows(model: PreTrainedModel, checkpoint: Tensors, theirs: bool) -> dict[str, Row]:
    """Return the rows of a model in 4 or 8 bits."""
    shapes = shapes_of(model)
    packed = checkpoint.quantized
    parts: dict[str, list[str]] = {name: [name] for name in packed}
    for name in checkpoint.names:
        if weight := part_of(name, packed):
            parts[weight].append(name)
    with Rows() as rows:
        for name, target in Plan(model, checkpoint).places(shapes):
            if name in packed:
                state = {key: checkpoint.read(key) for key in parts[name]}
                rows.add(
                    target, shapes.get(target, packed[name]), functools.partial(quantized_digests, state, name, theirs)
                )
            elif not part_of(name, packed):
                x = checkpoint.read(name)
                rows.add(target, shapes.get(target, x.shape), functools.partial(rounded_digest, x))
        return rows.all()
