"""Merge an adapter into its base: a plain folder of transformers', which opens without us.

Written tensor by tensor: in memory are the adapter and the tensor that is being made. Who was interrupted or killed
goes on with the same command, from the last file of a gigabyte that was whole.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from halfbyte import __version__
from halfbyte.choices import MergeType, Onto
from halfbyte.deploy.card import write_card
from halfbyte.deploy.folders import check_apart, check_room, free_folder, stamp
from halfbyte.errors import InputError
from halfbyte.files import growing_folder
from halfbyte.hf.models.dense import copy_beside, sources
from halfbyte.hf.models.merging import Merged
from halfbyte.hf.models.shards import write_shards
from halfbyte.locks import Locked

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
    folders = sources(model)
    check_apart(output, folders)
    sizes = model.sizes
    check_room(output, sum(sizes.values()), "The merged model")
    about = {"version": __version__, "onto": onto, "to": to, "sources": [stamp(folder) for folder in folders]}
    try:
        with growing_folder(output, json.dumps(about)) as folder:
            nbytes = write_shards(folder, sizes, lambda name: {name: model.read(name)}, progress)
            copy_beside(model, folder)
            model.config.dtype = str(DTYPES[to]).removeprefix("torch.")
            model.config.architectures = [model.architecture]
            model.config.save_pretrained(folder)
            form = "with an adapter merged onto " + (
                "the quantized weights that it was trained over" if model.base.is_quantized else "its dense weights"
            )
            write_card(folder, model.adapter, model.base.place, model.base.folder, f"{form}, in {to}")
    except Locked as error:
        raise InputError(f"{output} is being written by another process; wait for it, or choose another.") from error
    return MergedCopy(output, model.values, nbytes, model.base.is_quantized)

