"""Sections d, e and g: speed and memory beside the peer's, the headline's sizes within their limits, the prediction."""

import contextlib
import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from gpu import shapes
from gpu.agreement import under_test
from gpu.record import Job, OutOfTime, Section
from halfbyte import hf

GB = 10**9
HEADLINE = (("65B", 64, 48), ("33B", 16, 24), ("7B", 16, 6))
"""Shape, rank on all linear layers, the card's memory in GB."""


def speed(job: Job, section: Section) -> None:
    """d: speed and peak memory at 1B and 8B, against transformers, peft and bitsandbytes, in turns."""
    rank = 4 if job.tiny else 16
    for name in ("1B",) if job.tiny else ("1B", "8B"):
        sizes = shapes.shape(name, job)
        for rows, length in ((2, 24), (1, 96)) if job.tiny else ((4, 1024), (1, 4096)):
            for recompute in (False, True):
                title = f"{name}, {rows} x {length}, {'recomputed' if recompute else 'kept'}"
                fitted = True
                with section.part(title, job), under_test(job):
                    try:
                        _turns(job, section, title, sizes, (rows, length), rank, recompute)
                    except torch.OutOfMemoryError:
                        fitted = False
                if fitted:  # what fits without recomputing is faster so
                    break


def _turns(
    job: Job, section: Section, title: str, sizes: shapes.Shape, batch: tuple[int, int], rank: int, recompute: bool
) -> None:
    base = shapes.base(sizes, job.device)
    held = torch.cuda.memory_allocated(job.device) if job.on_gpu else 0
    sides: dict[str, tuple[Any, Any]] = {}
    own: dict[str, int] = {}
    before = held
    for side in ("peer", "halfbyte"):
        make: Callable[..., Any] = shapes.peer if side == "peer" else shapes.ours
        options = {"over": base} if side == "peer" else {"model": base}
        with contextlib.suppress(ImportError) if side == "peer" else contextlib.nullcontext():
            sides[side] = make(sizes, job, rank, recompute=recompute, **options)
        now = torch.cuda.memory_allocated(job.device) if job.on_gpu else 0
        own[side], before = now - before, now
    ids = shapes.tokens(sizes, *batch, job.device)
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    peaks: dict[str, int] = {}
    losses: dict[str, list[float]] = {side: [] for side in sides}
    for turn in range(2 if job.tiny else 4):  # the first is not counted
        for side, (model, optimizer) in sides.items():
            if time.monotonic() > section.until:
                raise OutOfTime(title)
            start = torch.cuda.memory_allocated(job.device) if job.on_gpu else 0
            if job.on_gpu:
                torch.cuda.reset_peak_memory_stats(job.device)
            job.wait()
            begun = time.perf_counter()
            try:
                losses[side].append(shapes.step(model, optimizer, [ids]))
            except torch.OutOfMemoryError as error:
                section.row(f"{title}: {side} does not fit", error=str(error)[:200])
                raise
            job.wait()
            if turn:
                seconds[side].append(time.perf_counter() - begun)
            grown = (torch.cuda.memory_allocated(job.device) if job.on_gpu else 0) - start
            own[side] += grown  # the optimizer's state, in the first step
            others = sum(size for other, size in own.items() if other != side)
            peaks[side] = (job.peak() or 0) - others
    found = {}
    for side in sides:
        found[side] = {
            "seconds": statistics.median(seconds[side]), "tokens_per_second": batch[0] * batch[1] / min(seconds[side]),
            "peak": peaks[side] if job.on_gpu else None, "losses": losses[side],
        }  # fmt: skip
        section.row(f"{title}: {side}", **found[side])
    predicted = shapes.predicted(sizes, rank, *batch, recompute=recompute)
    section.row(f"{title}: predicted", predicted=predicted, peak=found["halfbyte"]["peak"])
    model = sides["halfbyte"][0]
    section.row(f"{title}: layers", layers=hf.describe_layers(model), attention=hf.describe_attention(model))
    if "peer" in found:
        ratios = [theirs / mine for theirs, mine in zip(seconds["peer"], seconds["halfbyte"], strict=True)]
        section.row(f"{title}: times as fast", ratio=statistics.median(ratios), ratios=ratios)
        off = abs(losses["halfbyte"][0] / losses["peer"][0] - 1)
        section.check(f"{title}: the first loss is the peer's", off < 0.02, distance=off)


def headline(job: Job, section: Section) -> None:
    """e: 65B in 48 GB, 33B in 24 and 7B in 6, rank 64 and 16 on all linear layers, checkpointed, 8-bit state."""
    for name, rank, limit in HEADLINE:
        with section.part(f"{name} in {limit} GB", job), under_test(job):
            _within(job, section, shapes.shape(name, job), 4 if job.tiny else rank, limit * GB)


def _within(job: Job, section: Section, sizes: shapes.Shape, rank: int, limit: int) -> None:
    context, total = job.context() or 0, 0
    if job.on_gpu:
        job.clear()
        torch.zeros(8, 8, device=job.device).mm(torch.zeros(8, 8, device=job.device))  # its libraries' memory is there
        context = job.context() or 0
        total = torch.cuda.get_device_properties(job.device).total_memory
        allowed = min((limit - context) / total, 1.0)
        torch.cuda.set_per_process_memory_fraction(allowed, job.device)
    try:
        begun = time.monotonic()
        model, optimizer = shapes.ours(sizes, job, rank, recompute=True)
        job.wait()
        section.row(f"{sizes.name}: built", seconds=round(time.monotonic() - begun, 2))
        length = 32 if job.tiny else 512
        micro = [shapes.tokens(sizes, 1, length, job.device, seed=i) for i in range(16)]
        losses, seconds = [], []
        for _ in range(3):
            begun = time.monotonic()
            losses.append(shapes.step(model, optimizer, micro[:1]))
            job.wait()
            seconds.append(time.monotonic() - begun)
        section.check(f"{sizes.name}: the loss falls", losses[-1] < losses[0], losses=losses, seconds=seconds)
        if sizes.name.startswith("65B") and time.monotonic() + 20 * seconds[-1] < section.until:
            begun = time.monotonic()
            loss = shapes.step(model, optimizer, micro)
            job.wait()
            section.row(f"{sizes.name}: 16 x {length} by accumulation", loss=loss, seconds=time.monotonic() - begun)
        predicted = shapes.predicted(sizes, rank, 1, length, recompute=True)
        reserved = torch.cuda.max_memory_reserved(job.device) if job.on_gpu else None
        peak = job.peak()
        section.row(
            f"{sizes.name}: memory", peak=peak, reserved=reserved, context=context, limit=limit, predicted=predicted
        )
        if reserved is not None:
            section.check(f"{sizes.name}: within {limit / GB:.0f} GB", reserved + context <= limit)
    finally:
        model = optimizer = None  # gone before the limit is
        if job.on_gpu:
            gc.collect()
            torch.cuda.set_per_process_memory_fraction(1.0, job.device)


def prediction(report: dict[str, Any]) -> dict[str, Any]:
    """g: what the formula says of each peak."""
    rows = []
    for section in report["sections"].values():
        for row in section["rows"]:
            if row.get("predicted") and row.get("peak"):
                rows.append({"name": row["name"], "peak": row["peak"], "predicted": row["predicted"],
                             "off": row["predicted"] / row["peak"] - 1})  # fmt: skip
    far = [row["name"] for row in rows if abs(row["off"]) > 0.1]
    return {"title": prediction.__doc__, "holds": not far, "failed": far, "errors": [], "seconds": 0.0, "rows": rows}
