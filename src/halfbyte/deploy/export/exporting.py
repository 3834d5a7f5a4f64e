"""Export: one call for every format of :data:`halfbyte.deploy.export.formats.FORMATS`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from halfbyte.choices import ExportFormat, GgufAdapterType, GgufType, MergeType, Onto, Rounding
from halfbyte.deploy.card import write_card
from halfbyte.deploy.export.calibrated import ROUNDS, write_calibrated
from halfbyte.deploy.export.formats import settle
from halfbyte.deploy.export.gguf import export_gguf
from halfbyte.deploy.export.lora_gguf import export_lora_gguf
from halfbyte.deploy.export.mlx import LONG, dtype_of, unheeded_window, write_mlx
from halfbyte.deploy.folders import free_folder
from halfbyte.deploy.merge import DTYPES, merge, write_dense
from halfbyte.errors import InputError
from halfbyte.hf.models.dense import adapter_of, dense_model
from halfbyte.hf.models.hub import locate
from halfbyte.hf.models.quantize_files import on_disk, quantize_checkpoint


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        folder: where.
        nbytes: of the weights.
        values: of the model's tensors, before they were quantized.
        to: what they are in.
        notes: what its user should know, a sentence each.
    """

    folder: Path
    nbytes: int
    values: int
    to: str
    notes: tuple[str, ...] = ()


def export(
    run: str | Path,
    output: str | Path,
    *,
    format: ExportFormat,
    to: str | None = None,
    onto: Onto = "quantized",
    base: str | Path | None = None,
    data: Sequence[str] | None = None,
    rounds: int | None = None,
    rounding: Rounding | None = None,
    pre: str | None = None,
    report: Callable[[str, int, int], None] | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> Exported:
    """Write a run, an adapter or a model in another program's form to the folder ``output``, which appears whole.

    Args:
        run: folder of a run, of a PEFT adapter or of a model; a GGUF file; or a hub id.
        output: the new folder.
        format: which program's.
        to: what the weights are in; the format's own words, the first of which is the default.
        onto: of an adapter, which weights of its base it is added to.
        base: of an adapter, another place for its base than it names.
        data: of ``gptq``, ``awq`` and ``bnb-4bit``, rows to calibrate with; None: those that the run was trained on.
        rounds: of ``gptq`` and ``awq``, how often each layer's rounding is tuned.
        rounding: of ``bnb-4bit``, how codes are chosen; see :func:`halfbyte.deploy.merge.merge`.
        pre: of ``gguf``, llama.cpp's name for how the tokenizer cuts texts, where that is not recognised.
        report: called with what is being done, done and all.
        overwrite: replace a model that is there already.
        trust_remote_code: run code that comes with the model.

    Raises:
        InputError: the options do not go together, there is no such model, the format cannot hold it, a package is
            missing, a value is not finite, the folder is in use, or the disk has no room.
    """
    to = settle(format, to, {"data": data, "rounds": rounds, "rounding": rounding, "pre": pre})

    def progress(done: int, total: int) -> None:
        if report:
            report("Writing", done, total)

    if format == "gguf":
        file = export_gguf(
            run, output, to=cast(GgufType, to), onto=onto, base=base, pre=pre, progress=progress, overwrite=overwrite,
            trust_remote_code=trust_remote_code,
        )  # fmt: skip
        return Exported(file.folder, file.nbytes, file.values, to, tuple(file.notes))
    if format == "lora-gguf":
        alone = export_lora_gguf(
            run, output, to=cast(GgufAdapterType, to), base=base, overwrite=overwrite,
            trust_remote_code=trust_remote_code,
        )  # fmt: skip
        return Exported(alone.folder, alone.nbytes, alone.values, to)
    output = free_folder(output, overwrite)
    if format == "bnb-4bit":
        if adapter_of(locate(run)) is None:
            if data is not None or rounding is not None or base is not None:
                raise InputError(f"{run} has no adapter, so there is nothing to calibrate and no base to name for it.")
            return _in_4_bits(run, output, progress, overwrite, trust_remote_code)
        merged = merge(
            run, output, onto=onto, to="nf4", base=base, rounding=rounding, data=data,
            progress=progress, overwrite=overwrite, trust_remote_code=trust_remote_code,
        )  # fmt: skip
        return Exported(output, merged.nbytes, merged.values, to)
    dtype = {"hf": DTYPES.get(cast(MergeType, to)), "mlx": dtype_of(to)}.get(format) or DTYPES["bf16"]
    model = dense_model(run, onto, dtype, base=base, trust_remote_code=trust_remote_code)
    notes: tuple[str, ...] = ()
    match format:
        case "hf":
            nbytes = write_dense(model, output, onto, cast(MergeType, to), progress).nbytes
        case "mlx":
            nbytes = write_mlx(model, output, onto, to, progress)
            window = unheeded_window(model)
            notes = (LONG.format(window),) if window else ()
        case "gptq" | "awq":
            nbytes = write_calibrated(
                model, output, format, onto, data=data,
                rounds=ROUNDS if rounds is None else rounds, report=report, trust_remote_code=trust_remote_code,
            )  # fmt: skip
    return Exported(output, nbytes, model.values, to, notes)


def _in_4_bits(
    run: str | Path, output: Path, progress: Callable[[int, int], None], overwrite: bool, trust_remote_code: bool
) -> Exported:
    """Write a model without an adapter in NF4, with a card."""
    place = locate(run)

    def finish(folder: Path) -> None:
        write_card(folder, None, place, on_disk(place), "in bitsandbytes' NF4", packages="bitsandbytes", quantized=True)

    copy = quantize_checkpoint(
        run, output, finish=finish, progress=progress, overwrite=overwrite, trust_remote_code=trust_remote_code
    )
    return Exported(output, copy.bytes_after, copy.values, "nf4")
