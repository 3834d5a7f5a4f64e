"""What each way of merging keeps of what was learnt, measured on files that are written, opened, and removed again.

Everything computes in fp32, the base's 4-bit weights included, so that the weights of the ways alone differ. The
reference is the base and the adapter as they were trained; how far a way is from it :mod:`halfbyte.evaluate.fidelity`
says. One way at a time is in memory and on the disk.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

from halfbyte import hf
from halfbyte.choices import Compared, ExportFormat, MergeType, Onto, Rounding, Task
from halfbyte.data import tokenize
from halfbyte.deploy.audit_report import AuditReport, Measured
from halfbyte.deploy.export.exporting import export
from halfbyte.deploy.export.mlx import dense_state
from halfbyte.deploy.merge import merge
from halfbyte.errors import InputError, nearest
from halfbyte.evaluate.fidelity import Figures, Reference, Row, rows_of
from halfbyte.evaluate.texts import general_texts
from halfbyte.files import absolute, scratch
from halfbyte.hf.models.check import check_finite
from halfbyte.hf.models.configs import ADAPTER, json_of
from halfbyte.hf.models.dense import Plain
from halfbyte.hf.models.heads import adapter_task
from halfbyte.hf.models.hub import locate
from halfbyte.hf.models.quantize_files import quantize_checkpoint
from halfbyte.nn import QuantizedLinear
from halfbyte.train.rows import rows_again

POSITIONS = 2048
"""Labelled tokens that are compared."""
ELSEWHERE = 1024
"""The same of the general text."""
LONGEST = 256
"""Tokens of a passage of it."""
AUTO: dict[Task, Any] = {
    "lm": AutoModelForCausalLM,
    "classify": AutoModelForSequenceClassification,
    "seq2seq": AutoModelForSeq2SeqLM,
}


class Given(NamedTuple):
    """What a way is made of: an adapter, the base before it was quantized, texts and a seed; and whether code that
    comes with the model is run."""

    run: str | Path
    original: str | Path | None
    texts: Sequence[str] | None
    seed: int
    trust_remote_code: bool


@dataclass(frozen=True)
class Way:
    """A way to have base and adapter as one model.

    Attributes:
        about: in words.
        write: writes it to a folder.
        bits: of a weight, without constants.
    """

    about: str
    write: Callable[[Given, Path], Any]
    bits: int = 16


def _merged(onto: Onto, to: MergeType) -> Callable[[Given, Path], Any]:
    return lambda given, folder: merge(
        given.run,
        folder,
        onto=onto,
        to=to,
        base=given.original if onto == "original" else None,
        trust_remote_code=given.trust_remote_code,
    )


def _in_4_bits(rounding: Rounding | Compared) -> Callable[[Given, Path], Any]:
    return lambda given, folder: merge(
        given.run,
        folder,
        to="nf4",
        rounding=rounding,
        base=given.original if rounding == "original" else None,
        data=given.texts if rounding in ("outputs", "gptq") else None,
        seed=given.seed,
        trust_remote_code=given.trust_remote_code,
    )


def _again(given: Given, folder: Path) -> None:
    """Merge to bf16, and quantize that."""
    with scratch(folder) as merged:
        merge(given.run, merged / "dense", trust_remote_code=given.trust_remote_code)
        quantize_checkpoint(merged / "dense", folder, trust_remote_code=given.trust_remote_code)


def _exported(form: ExportFormat, to: str) -> Callable[[Given, Path], Any]:
    return lambda given, folder: export(
        given.run,
        folder,
        format=form,
        to=to,
        data=given.texts if form in ("gptq", "awq") else None,
        trust_remote_code=given.trust_remote_code,
    )


WAYS: dict[str, Way] = {
    "fp32": Way("onto the quantized weights", _merged("quantized", "fp32"), 32),
    "bf16": Way("onto the quantized weights", _merged("quantized", "bf16")),
    "fp16": Way("onto the quantized weights", _merged("quantized", "fp16")),
    "original-fp32": Way("onto the original weights", _merged("original", "fp32"), 32),
    "original-bf16": Way("onto the original weights", _merged("original", "bf16")),
    "original-fp16": Way("onto the original weights", _merged("original", "fp16")),
    "nf4-outputs": Way("codes that keep each layer's outputs", _in_4_bits("outputs"), 4),
    "nf4-random": Way("codes drawn between two neighbours", _in_4_bits("random"), 4),
    "nf4-original": Way("codes nearest to the original weights plus the change", _in_4_bits("original"), 4),
    "nf4-gptq": Way("codes by ordinary GPTQ", _in_4_bits("gptq"), 4),
    "nf4-nearest": Way("nearest codes to the base's constants", _in_4_bits("nearest"), 4),
    "nf4-again": Way("merged to bf16 and quantized again", _again, 4),
    "gguf-q8_0": Way("llama.cpp's 8 bits", _exported("gguf", "q8_0"), 8),
    "gguf-q4_0": Way("llama.cpp's 4 bits, nearest", _exported("gguf", "q4_0"), 4),
}
"""By name, as :func:`audit` takes them: those that are always measured."""
MORE: dict[str, Way] = {
    **{
        f"gguf-{to}": Way("for llama.cpp", _exported("gguf", to), int(to[1]))
        for to in ("q6_k", "q5_k_m", "q4_k_m", "q5_0", "q5_1", "q4_1")
    },
    "mlx-4bit": Way("for MLX", _exported("mlx", "4bit"), 4),
    "mlx-8bit": Way("for MLX", _exported("mlx", "8bit"), 8),
    "gptq": Way("GPTQ's form, by auto-round", _exported("gptq", "4bit"), 4),
    "awq": Way("AWQ's form, by auto-round", _exported("awq", "4bit"), 4),
}
"""Those that are measured where they are asked for, since they take longer or want another library."""


def audit(
    run: str | Path,
    *,
    data: Sequence[str] | None = None,
    calibration: Sequence[str] | None = None,
    original: str | Path | None = None,
    ways: Sequence[str] | None = None,
    positions: int = POSITIONS,
    seed: int = 0,
    work: str | Path | None = None,
    progress: Callable[[str, int, int], None] = lambda *_: None,
    trust_remote_code: bool = False,
) -> AuditReport:
    """Measure every way to merge an adapter.

    Args:
        run: folder of a run or of a PEFT adapter, or a hub id.
        data: rows to measure on; None: those that the run held out, or else those that it was trained on.
        calibration: texts for the ways that want some; None: those that the run was trained on.
        original: the 16-bit model that a base in 4 bits was made of.
        ways: names in :data:`WAYS` and :data:`MORE`; None: all of the first that are possible.
        positions: labelled tokens that are compared at most.
        seed: of which texts are taken and of what is drawn.
        work: folder in which each way is written while it is measured; None: the adapter's.
        progress: is told what is being done, and how many of all things are done.
        trust_remote_code: run code that comes with the model.

    Raises:
        InputError: there is no such run, or nothing to measure on; or a way that was named is not possible.
    """
    known = WAYS | MORE
    for name in ways or ():
        if name not in known:
            raise InputError(f"There is no way {name!r}{nearest(name, known)}; there is {', '.join(known)}.")
    adapter = Path(locate(run).path)
    if not (adapter / ADAPTER).is_file():
        raise InputError(f"{run} holds no adapter ({ADAPTER}); give the folder of a run or of a PEFT adapter.")
    names = list(ways or WAYS)
    progress("reading rows", 0, len(names) + 2)
    rows, told = _rows(adapter, data, trust_remote_code)
    task = adapter_task(json_of(adapter / ADAPTER))
    progress("base and adapter", 0, len(names) + 2)
    whole = in_fp32(hf.load(adapter, device="cpu", trust_remote_code=trust_remote_code))
    for name, x in whole.named_parameters():
        if x.is_floating_point():
            check_finite(name.removeprefix("base_model.model."), x)
    compared = _Compared(
        Reference(whole, rows, task, positions),
        Reference(whole, _general(adapter, trust_remote_code), task, ELSEWHERE) if task == "lm" else None,
    )
    if compared.rows.is_empty:
        raise InputError(f"None of the rows ({told}) has a labelled token, so there is nothing to measure on.")
    progress("base", 1, len(names) + 2)
    with whole.disable_adapter():
        without = compared.of(whole)
    whole = None
    trained = compared.of(None)
    found = [
        _measured("base", "without the adapter", without, trained, without),
        _measured("adapter", "base and adapter", trained, trained, without),
    ]
    left_out: dict[str, str] = {}
    given = Given(run, original, calibration, seed, trust_remote_code)
    for number, name in enumerate(names, 2):
        progress(name, number, len(names) + 2)
        way = known[name]
        with scratch((absolute(work) if work else adapter) / name) as folder:
            made = folder / "model"
            try:
                way.write(given, made)
                opened = _opened(made, task, trust_remote_code)
            except InputError as error:
                if ways:
                    raise
                left_out[name] = str(error).replace(f"{made}/", "")
                continue
            size = sum(file.stat().st_size for file in (*made.glob("*.safetensors"), *made.glob("*.gguf")))
            figures = compared.of(opened)
            del opened
        found.append(_measured(name, way.about, figures, trained, without, size, way.bits))
    (ours, general) = without
    return AuditReport(
        run=adapter.name,
        rows=told,
        positions=ours.positions,
        elsewhere=general.positions if general else 0,
        ways=found,
        left_out=left_out,
    )


def in_fp32(model: Any) -> Any:
    """Let a model compute in fp32 from here on, with the weights that it has; in place."""
    hf.unprepare(model)
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.compute_dtype = torch.float32
    for tensor in (*model.parameters(), *model.buffers()):  # transformers refuses float() over few bits
        if tensor.is_floating_point():
            tensor.data = tensor.data.float()
    return model.eval()


class _Compared(NamedTuple):
    """References on the rows and on the general text, if it can be compared."""

    rows: Reference
    general: Reference | None

    def of(self, model: Any) -> tuple[Figures, Figures | None]:
        return self.rows.compare(model), self.general.compare(model) if self.general else None


def _measured(
    name: str,
    about: str,
    figures: tuple[Figures, Figures | None],
    trained: tuple[Figures, Figures | None],
    without: tuple[Figures, Figures | None],
    nbytes: int | None = None,
    bits: int = 16,
) -> Measured:
    (ours, general), base = figures, without[0]
    learnt = base.loss - trained[0].loss
    return Measured(
        name=name,
        about=about,
        bits=bits,
        nbytes=nbytes,
        divergence=ours.divergence,
        agreement=ours.agreement,
        loss=ours.loss,
        accuracy=ours.accuracy,
        kept=(base.loss - ours.loss) / learnt if learnt > 0 else None,
        elsewhere=general.divergence if general else None,
        layers=[(one / other) ** 0.5 if other else 0.0 for one, other in zip(ours.apart, base.apart, strict=True)],
    )


def _rows(adapter: Path, data: Sequence[str] | None, trust_remote_code: bool) -> tuple[list[Row], str]:
    """Return rows to measure on, and what they are."""
    prepared = rows_again(adapter, None if data is None else list(data), trust_remote_code)
    if data is not None:
        return list(rows_of(prepared.train.rows)), ", ".join(Path(name).name for name in data)
    if prepared.evaluation:
        return list(rows_of(prepared.evaluation.rows)), "rows that were held out"
    return list(rows_of(prepared.train.rows)), "rows that were trained on (none was held out)"


def _general(adapter: Path, trust_remote_code: bool) -> list[Row]:
    tokenizer = hf.load_tokenizer(str(adapter), trust_remote_code=trust_remote_code)
    return list(rows_of(tokenize(general_texts(), tokenizer, LONGEST).rows))


def _opened(folder: Path, task: Task, trust_remote_code: bool) -> Any:
    """Open what was written: bitsandbytes' bits by halfbyte, those of others as the values that they stand for."""
    gguf = next(folder.glob("*.gguf"), None)
    about = {} if gguf else json_of(folder / "config.json")
    held = about.get("quantization_config")
    if "quantization" in about:  # MLX's word
        state, config = dense_state(folder)
        model = AUTO[task].from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
    elif held is not None and held.get("quant_method") not in ("gptq", "awq", "auto-round"):
        return in_fp32(hf.load(folder, device="cpu", task=task, trust_remote_code=trust_remote_code))
    elif gguf is None and held is None:
        options = {"dtype": torch.float32, "trust_remote_code": trust_remote_code}
        return AUTO[task].from_pretrained(folder, **options).eval()
    else:
        plain = Plain(locate(gguf or folder), torch.float32, trust_remote_code=trust_remote_code)
        model = type(plain.base.model)._from_config(plain.config, dtype=torch.float32)
        state = {planned.target: plain.read(name) for name, planned in plain.tensors.items()}
    model.load_state_dict(state, strict=False)  # of tied weights one is there
    model.tie_weights()
    return model.eval()
