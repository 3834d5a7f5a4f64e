"""The run of the training benchmark: the same work side by side, each side in a process of its own, steps in turns.

A machine's speed changes from minute to minute, so the sides take turns (A, B, C, A, B, C, ...) and ratios are taken
round by round. While one side takes a step the others wait, their threads asleep.

- Of a peer's settings each takes a step that is not counted and one that is; the fastest stays, the others end.
- Every side's first :data:`WARM_UP` steps are not counted. After the last round halfbyte takes one more step, profiled.
- Memory is the anonymous memory of a side's process (RssAnon in ``/proc/<pid>/status``; pages of mapped files are not
  the process's own), read every :data:`~halfbyte.bench.process.SAMPLING` seconds from loading to the last round; its
  highest, less what it was after the imports. A rise that is shorter can be missed.
- The floor of a step is its matrix work (:func:`matrix_flop`) at the machine's peak, timed in every round; the highest
  counts.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import random
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from halfbyte.bench.process import SideProcess, cpu_only, model_folder
from halfbyte.bench.run import LIBRARIES, circumstances, forced, peak
from halfbyte.bench.shapes import SHAPES
from halfbyte.bench.stacks import OURS, PEERS, Job, Peer, Side
from halfbyte.bench.training_report import SideResult, TrainingReport, TrainingRow
from halfbyte.bench.works import has_bitsandbytes
from halfbyte.errors import InputError, nearest
from halfbyte.hf.models.configs import read_config

WARM_UP = 3
PEAK_CALLS = 20
"""Of which the fastest counts: the first ones wake the threads."""
WORDS = (
    "the",
    "small",
    "river",
    "runs",
    "over",
    "old",
    "stones",
    "while",
    "two",
    "birds",
    "sing",
    "and",
    "nobody",
    "writes",
)


def bench_train(
    models: Sequence[str],
    *,
    versus: Sequence[str] = tuple(PEERS),
    batch: int = 4,
    lengths: Sequence[int] = (512,),
    rank: int = 16,
    steps: int = 5,
    threads: int | None = None,
    ours: Side = OURS,
    peers: dict[str, tuple[Peer, ...]] = PEERS,
    progress: Callable[[str], None] = lambda _: None,
) -> TrainingReport:
    """Measure training steps of each model at each length and return what was found.

    Args:
        models: folders or hub ids of 16-bit models, or names of :data:`halfbyte.bench.shapes.SHAPES`.
        versus: the others, of ``peers``.
        batch: rows of a step.
        lengths: tokens of a row.
        rank: of LoRA.
        steps: rounds that are counted, 2 or more.
        threads: of every side; None takes torch's number.
        ours: halfbyte's side.
        peers: the settings of each peer.
        progress: is told what happens.

    Raises:
        InputError: there is no such peer or model, bitsandbytes is not installed, or a side refuses its input.
    """
    for name in versus:
        if name not in peers:
            raise InputError(
                f"There is no side {name!r} to compare with{nearest(name, peers)}; there is {', '.join(peers)}."
            )
    if "bitsandbytes" in versus and not has_bitsandbytes():
        raise InputError("bitsandbytes is not installed: install it, or compare with lora16 alone.")
    with forced(None, threads), cpu_only():
        arithmetic, flop, ceiling = peak()
        found = circumstances(arithmetic, (*LIBRARIES, "transformers", "peft"))

        def rate() -> float:
            times = [time.perf_counter()]
            for _ in range(PEAK_CALLS):
                ceiling.calls[0]()
                times.append(time.perf_counter())
            return flop / min(end - begin for begin, end in itertools.pairwise(times))

        rows = []
        for model in models:
            name = model if model in SHAPES else Path(model).name
            with model_folder(model, progress) as folder:
                config = read_config(folder, trust_remote_code=False)
                for length in lengths:
                    job = Job(folder, "", "", batch, length, rank, WARM_UP + steps + 1)
                    settings = {"halfbyte": (ours,)} | {name: peers[name] for name in dict.fromkeys(versus)}
                    told = functools.partial(_tell, progress, f"{name}, {length} tokens")
                    results, parts, peaks = _measure(job, settings, steps, rate, told)
                    rows.append(
                        TrainingRow(
                            model=name,
                            batch=batch,
                            length=length,
                            rank=rank,
                            flop=matrix_flop(config, batch, length, rank),
                            peak_flops=peaks,
                            sides=results,
                            parts=parts,
                        )
                    )
    return TrainingReport(circumstances=found, rows=rows)


def matrix_flop(config: Any, batch: int, length: int, rank: int) -> int:
    """Return the floating-point operations of the products in one step that cannot be left out.

    Two for each weight and token in the forward pass and two for the gradient of its input, for the layers and for the
    head, which is evaluated where there is a token to predict; two for each of LoRA's weights three times, since they
    are trained; six products of attention's, half of each since it is causal. Nothing is recomputed.

    Args:
        config: transformers' configuration of a causal language model.
        batch: rows of a step.
        length: tokens of a row, all but the first of them trained.
        rank: of LoRA on every linear layer but the head.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    layers = [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]
    text = config.get_text_config()
    width = text.num_attention_heads * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    tokens = batch * length
    dense = 4 * tokens * sum(layer.in_features * layer.out_features for layer in layers)
    lora = 6 * tokens * rank * sum(layer.in_features + layer.out_features for layer in layers)
    logits = 4 * batch * (length - 1) * head.in_features * head.out_features
    attention = 6 * batch * length**2 * width * text.num_hidden_layers
    return int(dense + lora + logits + attention)


def _measure(
    job: Job,
    settings: Mapping[str, Sequence[Side]],
    steps: int,
    rate: Callable[[], float],
    progress: Callable[[str], None],
) -> tuple[dict[str, SideResult], dict[str, float], list[float]]:
    """Let the sides take turns.

    Returns:
        their results by name, where the time of halfbyte's step goes, and the machine's ``rate`` in each round.
    """
    rates = []
    sides: dict[str, SideProcess] = {}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="halfbyte-bench-")))
        data = _write_rows(folder / "rows.jsonl", job)
        job = dataclasses.replace(job, data=str(data), folder=str(folder / "run"))
        for name, ways in settings.items():
            sides[name] = _fastest(name, ways, job, progress)
            stack.callback(sides[name].end)
        for step in range(steps):
            for name, side in sides.items():
                progress(f"round {step + 1} of {steps}, {name}")
                side.step()
            rates.append(rate())
        progress("a profiled step")
        parts = sides["halfbyte"].profile()
        return {name: side.result(WARM_UP) for name, side in sides.items()}, parts, rates


def _fastest(name: str, ways: Sequence[Side], job: Job, progress: Callable[[str], None]) -> "SideProcess":
    """Start each of ``ways``, take the first steps with it, and return the fastest, the others ended.

    Raises:
        InputError: a side refuses its input.
        RuntimeError: none of them comes through its first steps.
    """
    best: SideProcess | None = None
    trials: dict[str, float | None] = {}
    for way in ways:
        progress(" ".join(filter(None, ["loading", name, way.setting])))
        process = SideProcess(way, job)
        try:
            process.load()
            for _ in range(WARM_UP):
                process.step()
        except ChildProcessError as error:
            process.end()
            trials[way.setting] = None
            failure = error
            continue
        except BaseException:
            for started in filter(None, (process, best)):
                started.end()
            raise
        trials[way.setting] = seconds = min(step.seconds for step in process.steps)
        if best is None or seconds < min(step.seconds for step in best.steps):
            best, process = process, best
        if process is not None:
            process.end()
    if best is None:
        raise RuntimeError(f"{name} did not come through its first steps: {failure}")
    best.trials = trials
    return best


def _tell(progress: Callable[[str], None], work: str, text: str) -> None:
    progress(f"{work}: {text}")


def _write_rows(file: Path, job: Job) -> Path:
    """Write a data file of ``job.batch`` texts, each of more than ``job.length`` tokens by whatever tokenizer."""
    rows = [random.Random(row).choices(WORDS, k=2 * job.length) for row in range(job.batch)]
    file.write_text("".join(json.dumps({"text": " ".join(row)}) + "\n" for row in rows), encoding="utf-8")
    return file
