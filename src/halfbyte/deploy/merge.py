"""Merge an adapter into its base: a plain folder of transformers', which opens without us.

Written tensor by tensor: in memory are the adapter and the tensor that is being made. Who was interrupted or killed
goes on with the same command, from the last file of a gigabyte that was whole.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from halfbyte.choices import MergeType, Onto
from halfbyte.deploy.card import write_card
from halfbyte.deploy.folders import free_folder, write_model
from halfbyte.hf.models.dense import Dense
from halfbyte.hf.models.merging import Merged

DTYPES: dict[MergeType, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class MergedCopy:
    """What was written.

    Attributes:
        folder: where.
        values: of all tensors.
        nbytes: of all tensors.
        is_quantized: whether the weights that the adapter was added to are those of 4 or 8 bits.
    """

    folder: Path
    values: int
    nbytes: int
    is_quantized: bool


def merge(
    run: str | Path,
    output: str | Path,
    *,
    onto: Onto = "quantized",
    to: MergeType = "bf16",
    base: str | Path | None = None,
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
        progress: called with tensors done and tensors in all.
        overwrite: replace a model that is there already.
        trust_remote_code: run code that comes with the model.

    Raises:
        InputError: there is no such adapter or base, they do not fit, a value is not finite or too large, the folder
            is in use, or the disk has no room.
    """
    output = free_folder(output, overwrite)
    model = Merged(run, onto, DTYPES[to], base=base, trust_remote_code=trust_remote_code)
    return write_dense(model, output, onto, to, progress)


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

    def finish(folder: Path) -> None:
        model.config.dtype = str(DTYPES[to]).removeprefix("torch.")
        model.config.architectures = [model.architecture]
        model.config.save_pretrained(folder)
        write_card(folder, model.adapter, model.base.place, model.base.folder, f"{form_of(model)}, in {to}")

    nbytes = write_model(
        model,
        output,
        {"onto": onto, "to": to},
        sizes=model.sizes,
        make=lambda name: {name: model.read(name)},
        finish=finish,
        what="The merged model" if model.adapter else "The dense model",
        progress=progress,
    )
    return MergedCopy(output, model.values, nbytes, model.base.is_quantized)


def form_of(model: Dense) -> str:
    """Return what a dense model is made of, as part of a sentence."""
    if model.adapter is None:
        return "as what its quantized weights stand for" if model.base.is_quantized else "its weights as they lie"
    which = "the quantized weights that it was trained over" if model.base.is_quantized else "its dense weights"
    return f"with an adapter merged onto {which}"
