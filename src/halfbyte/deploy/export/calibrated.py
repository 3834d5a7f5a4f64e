"""A model in GPTQ's or AWQ's 4 bits, by auto-round, calibrated on the rows that it was trained on.

    merged in bf16 → token rows, in blocks → auto-round, in a process of its own → the files beside tokenizer and card

Formats (arXiv 2210.17323 and 2306.00978, :mod:`halfbyte.hf.models.foreign.packed`): GPTQ's without zeros other than the
middle (``sym``), which plain torch computes too; AWQ's with zeros. Embedding and head stay in 16 bits.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import torch
from torch import nn

from halfbyte import __version__
from halfbyte.choices import Onto
from halfbyte.data import prepare
from halfbyte.data.options import DataOptions
from halfbyte.deploy.card import code, write_card
from halfbyte.deploy.export.autoround import Order, environment
from halfbyte.deploy.folders import check_apart
from halfbyte.deploy.merge import form_of, write_dense
from halfbyte.errors import InputError, check_room
from halfbyte.files import growing_folder, stamp
from halfbyte.hf.models.dense import Dense, copy_beside, sources, tokenizer_of
from halfbyte.hf.models.quantize_files import skeleton_of
from halfbyte.locks import Locked
from halfbyte.train.rows import rows_again

Calibrated = Literal["gptq", "awq"]
Report = Callable[[str, int, int], None]
GROUP_SIZES = (128, 64, 32)
LENGTH, COUNT = 512, 16
"""Tokens of a block, and blocks, that are calibrated with."""
ROUNDS = 20
FEWEST = 64
"""Tokens that say anything."""
WORK = "work"
CONFIG = "quantize_config.json"
"""Where AutoGPTQ looks."""
BAR = re.compile(r"(Quantizing)?.*?(\d+)/(\d+) \[")
"""What tqdm draws: of the layers, done and all; and of other things."""
TOLD = 12
"""Last lines of what auto-round said that are told where it fails."""


def write_calibrated(
    model: Dense,
    output: Path,
    form: Calibrated,
    onto: Onto,
    *,
    data: Sequence[str] | None = None,
    rounds: int = ROUNDS,
    report: Report | None = None,
    trust_remote_code: bool = False,
) -> int:
    """Write a dense model in GPTQ's or AWQ's form.

    Args:
        model: in bf16.
        output: as :func:`halfbyte.deploy.folders.free_folder` gives it.
        form: ``gptq`` or ``awq``.
        onto: which weights an adapter was added to.
        data: rows to calibrate with, named as for training; None: those that the run was trained on.
        rounds: of tuning the rounding of each layer; 0: there is none.
        report: called with what is being done, done and all.
        trust_remote_code: run code that comes with the model.

    Returns:
        The bytes of the weight files.

    Raises:
        InputError: there is no data, auto-round cannot do it, the folder is in use, the disk has no room, or a value is
            not finite.
    """
    report = report or (lambda *_: None)
    group_size = _group_size(model, trust_remote_code)
    report("Reading", 0, 0)
    ids = _blocks(model, data, trust_remote_code)
    folders = sources(model)
    check_apart(output, folders)
    check_room(output, 2 * sum(model.sizes.values()), "The model in 16 bits, which is made on the way, and the result")
    key = {"version": __version__, "format": form, "onto": onto, "sources": [stamp(folder) for folder in folders]}
    try:
        with growing_folder(output, json.dumps(key)) as folder:
            work = folder / WORK
            work.mkdir(exist_ok=True)
            merged = work / "merged"
            if not merged.is_dir():  # or else it is left from before an interrupt
                write_dense(model, merged, onto, "bf16", lambda done, total: report("Merging", done, total))
            made = _run(work, merged, form, ids, group_size, rounds, report, trust_remote_code)
            for file in [file for file in folder.iterdir() if file.is_file()]:
                file.unlink()  # of a process that was ended within what follows
            copy_beside(model, folder)
            for file in made.iterdir():
                if file.name.endswith((".safetensors", ".index.json")) or file.name in ("config.json", CONFIG):
                    os.replace(file, folder / file.name)
            shutil.rmtree(work)
            _tidy(folder / "config.json")
            told = f"{form.upper()}'s 4 bits (groups of {group_size})"
            write_card(
                folder, model.adapter, model.base.named, model.base.folder, f"{form_of(model)}, in {told}",
                use=_use(form, folder.name), quantized=True, tags=[form, "auto-round"],
                sections={"Quantization": _about(form, ids, data, rounds)},
            )  # fmt: skip
            return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    except Locked as error:
        raise InputError(f"{output} is being written by another process; wait for it, or choose another.") from error


def _group_size(model: Dense, trust_remote_code: bool) -> int:
    """Return the largest group that divides the rows of every layer that is quantized."""
    skeleton = skeleton_of(model.config, torch.bfloat16, trust_remote_code)
    if model.config.is_encoder_decoder or not skeleton.can_generate():
        raise InputError(
            f"{model.architecture} is no causal language model, and GPTQ and AWQ are for those; take --format hf."
        )
    head: Any = skeleton.get_output_embeddings()
    widths = {layer.in_features for layer in skeleton.modules() if isinstance(layer, nn.Linear) and layer is not head}
    if not widths:
        raise InputError(f"{model.architecture} has no layers of torch's Linear, which auto-round quantizes.")
    found = next((size for size in GROUP_SIZES if all(width % size == 0 for width in widths)), None)
    if found is None:
        odd = min(width for width in widths if width % GROUP_SIZES[-1])
        raise InputError(
            f"A layer of {model.architecture} has {odd} inputs, which is no multiple of {GROUP_SIZES[-1]}, and GPTQ "
            "and AWQ have groups of at least that; take another format."
        )
    return found


def _blocks(model: Dense, data: Sequence[str] | None, trust_remote_code: bool) -> np.ndarray:
    """Return the token ids to calibrate with, int32 ``[blocks, length]``."""
    files = None if data is None else list(data)
    if model.adapter is not None:
        table = rows_again(model.adapter, files, trust_remote_code).train.rows
    elif files is not None:
        options = DataOptions(model=str(model.base.place.path), data=files)
        table = prepare(options, tokenizer_of(model, trust_remote_code=trust_remote_code)).train.rows
    else:
        raise InputError(
            f"{model.base.place.path} is no run, so its data are not known; name rows to calibrate on (--data FILE)."
        )
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or LENGTH
    order = np.random.default_rng(0).permutation(len(table)).tolist()
    ids = blocks((table[number]["input_ids"] for number in order), min(LENGTH, longest), COUNT)
    if ids.size < FEWEST:
        raise InputError(f"The data has {ids.size} tokens, too few to calibrate on; name more with --data.")
    return ids


def blocks(rows: Iterable[Sequence[int]], length: int, count: int) -> np.ndarray:
    """Lay rows one behind the other and cut them into equal lengths, as GPTQ's and AWQ's authors do.

    Args:
        rows: token ids.
        length: of a block.
        count: of blocks, at most.

    Returns:
        int32 ``[blocks, length]``; of rows that do not fill one block, one that is shorter.
    """
    flat: list[int] = []
    for row in rows:
        flat += row
        if len(flat) >= length * count:
            break
    ids = np.array(flat[: length * count], np.int32)
    return ids[None] if len(ids) < length else ids[: len(ids) // length * length].reshape(-1, length)


def _run(
    work: Path, merged: Path, form: str, ids: np.ndarray, size: int, rounds: int, report: Report, trusted: bool
) -> Path:
    """Let auto-round work, and return the folder that it wrote."""
    room = work / "auto-round"
    shutil.rmtree(room, ignore_errors=True)
    room.mkdir()
    np.save(room / "blocks.npy", ids)
    order = Order(str(merged), str(room / "blocks.npy"), str(room / "made"), form, size, rounds, trusted, os.getpid())
    order.write(room / "order.json")
    command = [sys.executable, "-W", "ignore", "-m", "halfbyte.deploy.export.autoround", str(room / "order.json")]
    said: deque[str] = deque(maxlen=TOLD)
    with subprocess.Popen(
        command, cwd=room, env=environment(room), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        try:
            assert process.stdout is not None
            for line in _lines(process.stdout):
                found = BAR.match(line)
                if found and found[1]:
                    report("Quantizing", int(found[2]), int(found[3]))
                elif not found:
                    said.append(line)
        except BaseException:
            process.terminate()
            raise
    found_configs = sorted((room / "made").rglob("config.json"))
    if process.returncode or not found_configs:
        raise InputError(_why(process.returncode, list(said)))
    return found_configs[0].parent


def _lines(stream: IO[bytes]) -> Iterator[str]:
    """Yield what is written, at each new line and each return to its beginning."""
    rest = b""
    while piece := os.read(stream.fileno(), 1 << 16):
        *whole, rest = re.split(rb"[\r\n]+", rest + piece)
        yield from (line.decode(errors="replace") for line in whole if line.strip())
    if rest.strip():
        yield rest.decode(errors="replace")


def _why(code: int, said: list[str]) -> str:
    killed = "; it was killed, probably for want of memory" if code == -9 else ""
    return f"auto-round could not quantize the model (exit code {code}{killed}). It said last:\n" + "\n".join(said)


def _tidy(file: Path) -> None:
    """Take what tells of this machine out of a configuration."""
    config = json.loads(file.read_text(encoding="utf-8"))
    config.pop("_name_or_path", None)
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _about(form: str, ids: np.ndarray, data: Sequence[str] | None, rounds: int) -> str:
    of = (
        "rows that the run was trained on"
        if data is None
        else "rows of " + ", ".join(f"`{Path(name).name}`" for name in data)
    )
    how = "Activation-aware scales" if form == "awq" else "Rounding"
    tuned = f", the rounding tuned for {rounds} rounds a layer (SignRound, arXiv 2309.05516)" if rounds else ""
    return (
        f"{how} by auto-round, calibrated on {ids.size:,} tokens of {of}{tuned}. Embedding and head stay in 16 bits. "
        "What quantization does to answers was not measured here."
    )


def _use(form: str, name: str) -> str:
    lines = [
        "from transformers import AutoModelForCausalLM, AutoRoundConfig, AutoTokenizer, pipeline", "",
        f"name = {json.dumps(name)}",
        "model = AutoModelForCausalLM.from_pretrained(name, quantization_config=AutoRoundConfig())",
        'answer = pipeline("text-generation", model=model, tokenizer=AutoTokenizer.from_pretrained(name))',
        'print(answer([{"role": "user", "content": "Your question"}]))',
    ]  # fmt: skip
    more = " auto-round-lib" if form == "awq" else ""  # plain torch computes GPTQ
    return (
        f"On a CPU with `pip install auto-round{more}`, on GPUs in what reads {form.upper()}, such as vLLM:\n\n"
        f"{code('python', chr(10).join(lines))}"
    )
