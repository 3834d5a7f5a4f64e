"""Merge an adapter into its base: a plain folder of transformers', which opens without us.

In 16 or 32 bits (:mod:`halfbyte.hf.models.merging`), or in 4 (:mod:`halfbyte.hf.models.four_bits`).

Written tensor by tensor: in memory are the adapter and the tensor that is being made. Who was interrupted or killed
goes on with the same command, from the last file of a gigabyte that was whole.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfbyte.choices import Compared, MergeType, Onto, Rounding
from halfbyte.deploy.card import evaluation_of, write_card
from halfbyte.deploy.folders import free_folder, write_model
from halfbyte.errors import InputError
from halfbyte.hf.models.apart import read_stack, stacked
from halfbyte.hf.models.dense import Dense, Written
from halfbyte.hf.models.four_bits import In4Bits
from halfbyte.hf.models.hub import locate
from halfbyte.hf.models.merging import Merged
from halfbyte.train.rows import has_rows, rows_again, some_texts

DTYPES: dict[MergeType, torch.dtype] = {
    "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "nf4": torch.bfloat16
}  # fmt: skip
"""Of what stays dense."""
TOKENS = 8192
"""Of texts on which a layer's outputs are kept."""
ROUNDED: dict[Rounding | Compared, str] = {
    "outputs": "rounded so that each layer's outputs stay what they were",
    "random": "rounded at random to one of the two neighbours",
    "original": "the nearest ones of the original weights plus what was learnt",
    "nearest": "the nearest ones, which loses most of what was learnt",
    "gptq": "chosen by GPTQ, which loses some of what was learnt",
}


@dataclass(frozen=True)
class MergedCopy:
    """What was written.

    Attributes:
        folder: where.
        values: of all tensors.
        nbytes: of all tensors.
        is_quantized: whether the weights that the adapter was added to are those of 4 or 8 bits.
        rounding: how they became 4 bits again, if they did.
    """

    folder: Path
    values: int
    nbytes: int
    is_quantized: bool
    rounding: Rounding | Compared | None = None


def merge(
    run: str | Path,
    output: str | Path,
    *,
    onto: Onto = "quantized",
    to: MergeType = "bf16",
    base: str | Path | None = None,
    rounding: Rounding | Compared | None = None,
    data: Sequence[str] | None = None,
    tokens: int | None = None,
    seed: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> MergedCopy:
    """Write the model that a base and an adapter are together to the folder ``output``, which appears whole.

    Args:
        run: folder of a run or of a PEFT adapter, or a hub id.
        output: the new folder.
        onto: ``quantized``: the weights that the adapter was trained over; ``original``: those before them.
        to: what the sums, made in fp32, are rounded to.
        base: another place for the base than the adapter names, such as the original of one that lies in 4 bits.
        rounding: of ``nf4``, how the codes are chosen; None: ``outputs`` where texts are at hand, or else ``random``.
            ``nearest`` and ``gptq`` are there to be compared with.
        data: texts for ``outputs``, as a run's option of that name; None: those that the run was trained on.
        tokens: of these, so many; None: 8,192.
        seed: of which texts are taken and of what is drawn; None: 0.
        progress: called with tensors done and tensors in all.
        overwrite: replace a model that is there already.
        trust_remote_code: run code that comes with the model.

    Raises:
        InputError: there is no such adapter or base, they do not fit, a value is not finite or too large, the folder
            is in use, the disk has no room, or options do not go together.
    """
    _check_options(onto, to, rounding=rounding, data=data, tokens=tokens, seed=seed)
    output = free_folder(output, overwrite)
    if to != "nf4":
        return write_dense(
            Merged(run, onto, DTYPES[to], base=base, trust_remote_code=trust_remote_code), output, onto, to, progress
        )
    rounding, texts = _texts(run, rounding, data, TOKENS if tokens is None else tokens, seed or 0, trust_remote_code)
    model = In4Bits(run, rounding, texts, original=base, seed=seed or 0, trust_remote_code=trust_remote_code)
    seen = hashlib.sha256(b"".join(text.numpy().tobytes() for text in texts)).hexdigest()
    about = {"onto": onto, "to": to, "base": str(base), "drawn": f"{rounding} {seed or 0} {seen}"}
    form = f"{form_of(model)}, in {to}, its codes {ROUNDED[rounding]}"
    nbytes = _write(model, output, about, model.make, model.sizes, to, form, f"nf4-{rounding}", progress)
    return MergedCopy(output, model.values, nbytes, model.base.is_quantized, rounding)


def write_dense(
    model: Dense, output: Path, onto: Onto, to: MergeType, progress: Callable[[int, int], None] | None = None
) -> MergedCopy:
    """Write a dense model as transformers opens it.

    Args:
        model: made for the dtype that ``to`` stands for.
        output: as :func:`halfbyte.deploy.folders.free_folder` gives it.
        onto, to, progress: as for :func:`merge`.

    Raises:
        InputError: as :func:`merge`.
    """

    stacks = model.base.stacks

    def make(name: str) -> dict[str, Tensor]:
        return {name: read_stack(stacks[name], model.read) if name in stacks else model.read(name)}

    about = {"onto": onto, "to": to}
    way = to if onto == "quantized" else f"original-{to}"
    sizes = stacked(model.sizes, stacks)
    nbytes = _write(model, output, about, make, sizes, to, f"{form_of(model)}, in {to}", way, progress)
    return MergedCopy(output, model.values, nbytes, model.base.is_quantized)


def form_of(model: Written) -> str:
    """Return what a model is made of, as part of a sentence."""
    if model.adapter is None:
        return "as dense weights"
    which = "the quantized weights that it was trained over" if model.base.is_quantized else "its dense weights"
    return f"with an adapter merged onto {which}"


def _write(
    model: Written,
    output: Path,
    about: Mapping[str, Any],
    make: Callable[[str], Mapping[str, Tensor]],
    sizes: Mapping[str, int],
    to: MergeType,
    form: str,
    way: str,
    progress: Callable[[int, int], None] | None,
) -> int:
    """Write a model with the card that says what it is (``form``), and what the audit found of this ``way``."""

    def finish(folder: Path) -> None:
        model.config.dtype = str(DTYPES[to]).removeprefix("torch.")
        model.config.architectures = [model.architecture]
        model.config.save_pretrained(folder)
        packages = "bitsandbytes" if to == "nf4" else None
        write_card(
            folder, model.adapter, model.base.named, model.base.folder, form,
            packages=packages, sections=evaluation_of(model.adapter, way),
        )  # fmt: skip

    what = "The merged model" if model.adapter else "The dense model"
    return write_model(model, output, about, sizes=sizes, make=make, finish=finish, what=what, progress=progress)


def _check_options(onto: Onto, to: MergeType, **given: Any) -> None:
    """Refuse what does not go together."""
    told = [name for name, value in given.items() if value is not None]
    if to != "nf4" and told:
        raise InputError(f"{told[0]} is for 4 bits alone; say --to nf4, or leave it out.")
    if to == "nf4" and onto == "original" and given["rounding"] != "original":
        raise InputError(
            "In 4 bits the weights are those that were trained over; for what was learnt over the original weights "
            "say --rounding original."
        )
    if given["rounding"] in ("random", "original") and (given["data"] or given["tokens"] is not None):
        raise InputError(f"rounding {given['rounding']} takes no data; leave data and tokens out.")
    if given["tokens"] is not None and given["tokens"] < 1:
        raise InputError(f"tokens is {given['tokens']}; it must be at least 1.")


def _texts(
    run: str | Path,
    rounding: Rounding | Compared | None,
    data: Sequence[str] | None,
    tokens: int,
    seed: int,
    trust_remote_code: bool,
) -> tuple[Rounding | Compared, list[Tensor]]:
    """Return the way of rounding, and the texts that it takes."""
    folder = Path(locate(run).path)
    if rounding is None:
        rounding = "outputs" if data or has_rows(folder) else "random"
    if rounding not in ("outputs", "gptq"):
        return rounding, []
    try:
        rows = rows_again(folder, None if data is None else list(data), trust_remote_code)
    except InputError as error:
        if data is not None:
            raise
        raise InputError(
            f"{error} Without the training data name other texts (--data FILE), or round without any (--rounding "
            "random)."
        ) from error
    return rounding, some_texts(rows.train, tokens, seed)
