"""What packing brings: the steps of short rows, packed and unpacked, beside steps of full rows, in turns.

The rows have lengths like those of instruction data (log-normal, median 90, up to the full length) or 20 tokens each,
and random ids, all trained. The order is the trainer's own with ``group_by_length``, over an epoch in which it sorts as
in a large data set; the steps that are measured are spread over it, from its longest rows to its shortest. Each side is
a process of its own (:mod:`halfbyte.bench.process`), and every step goes through the whole trainer.
"""

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.trainer_pt_utils import get_length_grouped_indices

from halfbyte.bench.packing_report import FULL, PackedSide, PackingReport, PackingRow
from halfbyte.bench.process import SideProcess, cpu_only, model_folder
from halfbyte.bench.run import LIBRARIES, circumstances, forced, peak
from halfbyte.bench.stacks import LEARNING_RATE, MAX_GRAD_NORM, SEED, Job, Pace
from halfbyte.bench.train import WARM_UP
from halfbyte.data.packing import best_fit_decreasing, plan_packing

MEDIAN, SIGMA, LEAST, SHORT = 90, 0.8, 8, 20
EPOCH = 50
"""Steps of an epoch, as many as transformers (5.23) sorts together."""
FIELDS = {"seconds", "processor_seconds", "losses", "peak_bytes"}


@dataclasses.dataclass(frozen=True)
class Stepping:
    """halfbyte's trainer over rows of given lengths, in their order.

    Attributes:
        lengths: tokens of each row, ``job.batch * accumulation`` a step.
        accumulation: micro-batches of a step.
        packed: the most tokens of a packed micro-batch; None for padded ones.
    """

    lengths: tuple[int, ...]
    accumulation: int
    packed: int | None

    @property
    def setting(self) -> str:
        """Which way this is."""
        return "packed" if self.packed else "padded"

    def passes(self, steps: list[list[int]], batch: int) -> list[int]:
        """Return how many forward passes each step takes, ``batch`` rows in a padded one."""
        padded = self.accumulation
        if self.packed is None:
            return [padded] * len(steps)
        return [min(len(best_fit_decreasing(step, self.packed)), padded) for step in steps]

    def run(self, job: Job, pace: Pace) -> None:
        """Load, then take a step each time that ``pace`` returns."""
        import datasets
        from transformers import TrainerCallback

        from halfbyte import data, hf
        from halfbyte.train import TrainConfig
        from halfbyte.train.build import build_model, build_trainer
        from halfbyte.train.methods import METHODS

        config = TrainConfig(
            model=job.model,
            data=job.data,
            output=Path(tempfile.mkdtemp(dir=job.folder)),
            rank=job.rank,
            lora_alpha=2 * job.rank,
            lora_dropout=0.0,
            max_steps=job.steps,
            batch_size=job.batch,
            gradient_accumulation_steps=self.accumulation,
            max_length=job.length,
            learning_rate=LEARNING_RATE,
            max_grad_norm=MAX_GRAD_NORM,
            seed=SEED,
            save_steps=job.steps + 1,
        )
        pace.loading()
        model = build_model(config)
        pace.loaded()
        generator = np.random.default_rng(SEED)
        ids = [generator.integers(0, 250, length).tolist() for length in self.lengths]
        rows = data.Tokenized(datasets.Dataset.from_dict({"input_ids": ids, "labels": ids}), data.table.Counts())
        prepared = data.Prepared(rows, None, data.bad_rows.BadRows(), None, {}, [])
        trainer = build_trainer(config, METHODS["sft"], model, hf.load_tokenizer(job.model), prepared)
        trainer.args.train_sampling_strategy = "sequential"
        trainer.packer = data.Packer(self.packed) if self.packed else None

        class Told(TrainerCallback):  # type: ignore[misc]
            def on_train_begin(self, *_: Any, **__: Any) -> None:
                pace.ready()

            def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
                if "loss" in logs:
                    pace.stepped(logs["loss"])

        trainer.add_callback(Told())
        trainer.train()


def bench_packing(
    model: str = "135m",
    *,
    batch: int = 4,
    accumulation: int = 4,
    length: int = 512,
    rank: int = 16,
    steps: int = 5,
    threads: int | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> PackingReport:
    """Measure steps of short rows, packed and padded, beside steps of full ones.

    Args:
        model: folder or hub id of a 16-bit model, or a name of :data:`halfbyte.bench.shapes.SHAPES`.
        batch: rows of a padded micro-batch.
        accumulation: of them in a step.
        length: tokens of a full row, and the most of any.
        rank: of LoRA.
        steps: rounds that are counted, 2 or more.
        threads: of every side; None takes torch's number.
        progress: is told what happens.
    """
    group, taken = batch * accumulation, WARM_UP + steps
    count = 4 * EPOCH * group  # from so many on as many steps as EPOCH are sorted together
    kinds = {
        FULL: [length] * (group * taken),
        f"instructions, {LEAST} to {length}": spread_steps(instruction_lengths(count, length), group, steps),
        f"{SHORT} tokens": [min(SHORT, length)] * (group * taken),
    }
    with forced(None, threads), cpu_only(), model_folder(model, progress) as folder:
        arithmetic, *_ = peak()
        job = Job(folder, "none.jsonl", "", batch, length, rank, taken)
        found = circumstances(arithmetic, (*LIBRARIES, "transformers", "peft"))
        rows = _measure(kinds, job, accumulation, progress)
    return PackingReport(
        circumstances=found,
        model=Path(model).name,
        batch=batch,
        accumulation=accumulation,
        length=length,
        rank=rank,
        rows=rows,
    )


def instruction_lengths(count: int, length: int) -> list[int]:
    """Return lengths as instruction data has them: log-normal around :data:`MEDIAN`, up to ``length``."""
    drawn = np.random.default_rng(SEED).lognormal(np.log(MEDIAN), SIGMA, count)
    return [int(x) for x in drawn.clip(min(LEAST, length), length)]


def spread_steps(lengths: list[int], group: int, steps: int) -> list[int]:
    """Return the lengths of steps that are spread over an epoch in the trainer's order, in a random one.

    Args:
        lengths: of an epoch's rows, four times ``EPOCH`` steps or more.
        group: rows of a step.
        steps: that are wanted; the longest comes before them, :data:`WARM_UP` times.
    """
    order = get_length_grouped_indices(lengths, group, generator=torch.Generator().manual_seed(SEED))
    whole = [[lengths[index] for index in order[step * group : (step + 1) * group]] for step in range(EPOCH)]
    places = ((np.arange(steps) + 0.5) / steps * EPOCH).astype(int)
    mixed = np.random.default_rng(SEED).permutation(places).tolist()
    return [length for place in [0] * WARM_UP + mixed for length in whole[place]]


def _measure(
    kinds: dict[str, list[int]], job: Job, accumulation: int, progress: Callable[[str], None]
) -> list[PackingRow]:
    """Let the sides of all kinds take turns."""
    group = job.batch * accumulation
    sides: dict[tuple[str, str], SideProcess] = {}
    with contextlib.ExitStack() as stack:
        job = dataclasses.replace(
            job, folder=stack.enter_context(tempfile.TemporaryDirectory(prefix="halfbyte-bench-"))
        )
        for name, lengths in kinds.items():
            tokens = plan_packing(lengths, job.batch, accumulation, job.length, False).tokens
            for packed in [None] if name == FULL else [tokens, None]:
                side = Stepping(tuple(lengths), accumulation, packed)
                progress(f"loading {name}, {side.setting}")
                process = sides[name, side.setting] = SideProcess(side, job)
                stack.callback(process.end)
                process.load()
        for step in range(job.steps):
            for (name, setting), process in sides.items():
                progress(f"step {step + 1} of {job.steps}, {name}, {setting}")
                process.step()
        rows = []
        for name, lengths in kinds.items():
            counted = [lengths[first : first + group] for first in range(WARM_UP * group, len(lengths), group)]
            own = {
                setting: PackedSide(
                    passes=_stepping(process).passes(counted, job.batch),
                    **process.result(WARM_UP).model_dump(include=FIELDS),
                )
                for (kind, setting), process in sides.items()
                if kind == name
            }
            padded = [
                sum(job.batch * max(step[first : first + job.batch]) for first in range(0, group, job.batch))
                for step in counted
            ]
            rows.append(PackingRow(name=name, tokens=[sum(step) for step in counted], padded_tokens=padded, sides=own))
    return rows


def _stepping(process: SideProcess) -> Stepping:
    assert isinstance(process.side, Stepping)
    return process.side
