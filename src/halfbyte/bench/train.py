"""The run of the training benchmark: the same work side by side, each side in a process of its own, steps in turns.

A machine's speed changes from minute to minute, so the sides take turns (A, B, C, A, B, C, ...) and ratios are taken
round by round. While one side takes a step the others wait, their threads asleep.

- Of a peer's settings each takes a step that is not counted and one that is; the fastest stays, the others end.
- Every side's first :data:`WARM_UP` steps are not counted. After the last round halfbyte takes one more step, profiled.
- Memory is the anonymous memory of a side's process (RssAnon in ``/proc/<pid>/status``; pages of mapped files are not
  the process's own), read every :data:`SAMPLING` seconds from loading to the last round; its highest, less what it was
  after the imports. A rise that is shorter can be missed.
- The floor of a step is its matrix work (:func:`matrix_flop`) at the machine's peak, timed in every round; the highest
  counts.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import multiprocessing
import os
import random
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from halfbyte.bench.run import LIBRARIES, circumstances, forced, peak
from halfbyte.bench.shapes import SHAPES, write_model
from halfbyte.bench.stacks import OURS, PEERS, Failed, Imported, Job, Loaded, Peer, Side, Step, serve
from halfbyte.bench.training_report import SideResult, TrainingReport, TrainingRow
from halfbyte.bench.works import has_bitsandbytes
from halfbyte.errors import InputError, nearest
from halfbyte.hf.models.loader import read_config

WARM_UP = 3
PEAK_CALLS = 20
"""Of which the fastest counts: the first ones wake the threads."""
SAMPLING = 0.02
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

Message = TypeVar("Message")


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
    with forced(None, threads), _environment():
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
            with _model_folder(model, progress) as folder:
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
    sides: dict[str, _Process] = {}
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


def _fastest(name: str, ways: Sequence[Side], job: Job, progress: Callable[[str], None]) -> "_Process":
    """Start each of ``ways``, take the first steps with it, and return the fastest, the others ended.

    Raises:
        InputError: a side refuses its input.
        RuntimeError: none of them comes through its first steps.
    """
    best: _Process | None = None
    trials: dict[str, float | None] = {}
    for way in ways:
        progress(" ".join(filter(None, ["loading", name, way.setting])))
        process = _Process(way, job)
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


class _Process:
    """A side in its process, seen from here."""

    def __init__(self, side: Side, job: Job) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._connection, theirs = spawn.Pipe()
        self._process = spawn.Process(target=serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()
        self._connection.send((side, job))
        self.side = side
        self.trials: dict[str, float | None] = {}
        self.steps: list[Step] = []
        self._imports = self._peak = 0
        self._load_seconds = 0.0

    def load(self) -> None:
        """Have the side import, then load."""
        self._receive(Imported)
        self._imports = self._peak = _anonymous(self._process.pid)
        self._load_seconds = self._ask("load", Loaded).seconds

    def step(self) -> None:
        """Have the side take a step."""
        self.steps.append(self._ask("step", Step))

    def profile(self) -> dict[str, float]:
        """Have the side take a step of which the parts are told."""
        peak = self._peak
        parts = self._ask("profile", Step).parts
        self._peak = peak  # a profile takes memory of its own
        assert parts is not None
        return parts

    def processor_seconds(self) -> float:
        """Return the processor time that the side has taken so far, all threads together."""
        times = psutil.Process(self._process.pid).cpu_times()
        return float(times.user + times.system)

    def result(self, warm_up: int) -> SideResult:
        """Return what was measured, the first ``warm_up`` steps apart."""
        return SideResult(
            setting=self.side.setting,
            trials=self.trials,
            seconds=[step.seconds for step in self.steps[warm_up:]],
            losses=[step.loss for step in self.steps],
            load_seconds=self._load_seconds,
            peak_bytes=self._peak - self._imports if self._imports else None,
        )

    def end(self) -> None:
        """End the process; what it would still write is not wanted."""
        self._process.kill()
        self._process.join()
        self._connection.close()

    def _ask(self, command: str, kind: type[Message]) -> Message:
        with contextlib.suppress(OSError):  # a process that has ended is found out by what it does not answer
            self._connection.send(command)
        return self._receive(kind)

    def _receive(self, kind: type[Message]) -> Message:
        """Wait for a message, watching the side's memory.

        Raises:
            ChildProcessError: the side failed, or was ended from outside.
            InputError: it refused its input.
        """
        while not self._connection.poll(SAMPLING):
            self._peak = max(self._peak, _anonymous(self._process.pid))
        try:
            message = self._connection.recv()
        except (EOFError, OSError):
            self._process.join()
            raise ChildProcessError(
                f"its process ended with exit code {self._process.exitcode}, perhaps for want of memory"
            ) from None
        if isinstance(message, Failed):
            raise (InputError if message.user else ChildProcessError)(message.text)
        assert isinstance(message, kind), message
        return message


def _tell(progress: Callable[[str], None], work: str, text: str) -> None:
    progress(f"{work}: {text}")


def _anonymous(pid: int | None) -> int:
    """Return the anonymous memory of a process in bytes, or 0 where the system does not tell or the process is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    found = re.search(r"^RssAnon:\s+(\d+) kB$", status, re.MULTILINE)
    return 1024 * int(found[1]) if found else 0


def _write_rows(file: Path, job: Job) -> Path:
    """Write a data file of ``job.batch`` texts, each of more than ``job.length`` tokens by whatever tokenizer."""
    rows = [random.Random(row).choices(WORDS, k=2 * job.length) for row in range(job.batch)]
    file.write_text("".join(json.dumps({"text": " ".join(row)}) + "\n" for row in rows), encoding="utf-8")
    return file


@contextlib.contextmanager
def _model_folder(model: str, progress: Callable[[str], None]) -> Iterator[str]:
    """Yield what to load: the model itself, or the folder of a temporary one of the shape that it names."""
    if model not in SHAPES:
        yield model
        return
    with tempfile.TemporaryDirectory(prefix="halfbyte-bench-") as folder:
        progress(f"writing random weights of the shape {model}")
        write_model(model, Path(folder))
        yield folder


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """Keep the processes that are started meanwhile on the CPU, and torch's profiler from printing."""
    before = dict(os.environ)
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "KINETO_LOG_LEVEL": "99"}
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
