"""Why a run was slow: what its events and circumstances say of kernels, threads, layers, memory and waiting.

kernels, threads     of another provider or tier than the fastest, or fewer threads than cores
layers, attention    that ran as transformers writes them
activations          that were computed twice for want of memory
memory               all of it taken, so that the system paged
padding              rows of many lengths in one batch
beside the steps     evaluations, samples and saving
"""

import contextlib
from collections.abc import Iterator

from halfbyte.errors import InputError, size_text
from halfbyte.plan.doctor.finding import Finding
from halfbyte.runs.events import Note
from halfbyte.runs.folder import RunFolder
from halfbyte.runs.history import Run, rate
from halfbyte.runs.report.words import duration, rate_unit

BESIDE = 0.4
"""Share of the time beside the steps to be told."""
FULL = 0.95
"""Share of the machine's memory that is all of it."""
UNEVEN = 3.0
"""How many times the mean length the longest row is where padding costs."""


def check(run: Run) -> Iterator[Finding]:
    """Yield how fast it was, and what made it slow."""
    if not run.steps:
        return
    speed = rate(run.steps)
    if speed:
        yield Finding("speed", f"{speed:,.1f} {rate_unit(run)} a second while steps were made")
    yield from _circumstances(run)
    yield from _told(run)
    yield from _memory(run)
    yield from _padding(run)
    yield from _beside(run)


def _circumstances(run: Run) -> Iterator[Finding]:
    kernels = str(run.circumstances.get("kernels", ""))
    if kernels.startswith("reference") or kernels == "native (scalar)":
        yield Finding(
            "kernels",
            f"{kernels} were in force",
            "They are several times slower than those for vector units.",
            "halfbyte doctor  # says what keeps the native ones away",
            "warning",
        )
    threads, cores = run.circumstances.get("threads"), run.circumstances.get("cores")
    processes = run.circumstances.get("processes") or 1
    if isinstance(threads, int) and isinstance(cores, int) and threads * processes < cores:
        yield Finding(
            "threads",
            f"{threads} in {processes} process{'es' if processes > 1 else ''}, on {cores} cores",
            "Cores did nothing.",
            f"export OMP_NUM_THREADS={cores // processes}",
            "warning",
        )
    elif isinstance(threads, int) and isinstance(cores, int) and threads * processes > cores:
        yield Finding(
            "threads",
            f"{threads * processes} threads on {cores} cores",
            "Each waits for the one that has no core.",
            f"export OMP_NUM_THREADS={max(1, cores // processes)}",
            "warning",
        )


def _told(run: Run) -> Iterator[Finding]:
    """Yield what the run has said of the way it computes."""
    notes = [note.text for note in run.of(Note)]
    for text in dict.fromkeys(notes):
        if text.startswith(("Decoder layers", "Layers")) and "unfused" in text:
            yield Finding(
                "decoder layers",
                text,
                "They run as transformers writes them: each norm, activation and rotation is a pass over memory.",
                "Take a model of a family that is fused: Llama, Mistral, Qwen, SmolLM3, Phi-3, Gemma, OLMo.",
                "note",
            )
        elif text.startswith("Attention ") and "over " not in text and "there is none" not in text:
            yield Finding("attention", text, "It computes with masks, also where rows are packed.", "", "note")
        elif text.startswith("Activations of") and "recomputed" in text:
            yield Finding(
                "activations",
                text,
                "What does not fit into memory is computed a second time.",
                "halfbyte train --memory SIZE --batch-size N ...  # more memory, or fewer rows a pass",
                "note",
            )


def _memory(run: Run) -> Iterator[Finding]:
    there = run.circumstances.get("memory_bytes")
    if run.peak_memory and isinstance(there, int) and there and run.peak_memory > FULL * there:
        yield Finding(
            "memory",
            f"{size_text(run.peak_memory)} of the machine's {size_text(there)}",
            "The system had to page: a step then waits for the disk.",
            "halfbyte train --memory SIZE ...  # less than that",
            "warning",
        )


def _padding(run: Run) -> Iterator[Finding]:
    about = run.data
    packed = None
    with contextlib.suppress(InputError):  # run.json is damaged, which is told elsewhere
        packed = RunFolder(run.path).packed_tokens()
    if about is None or not about.rows or packed:
        return
    mean = about.tokens / about.rows
    is_grouped = run.options.get("group_by_length", True)
    size = run.options.get("batch_size", 1)
    if not is_grouped and isinstance(size, int) and size > 1 and about.longest > UNEVEN * mean:
        yield Finding(
            "padding",
            f"rows have {mean:,.0f} tokens on average and up to {about.longest:,}, in batches that are not sorted",
            "Short rows are padded to the longest of their batch, which is computed too.",
            "halfbyte train --group-by-length ...  # or --packing",
            "warning",
        )


def _beside(run: Run) -> Iterator[Finding]:
    made, before = 0.0, 0
    for step in run.steps:
        if step.tokens_per_second > 0:
            made += (step.trained_tokens - before) / step.tokens_per_second
        before = step.trained_tokens
    whole = run.steps[-1].elapsed
    if whole > 10 and made and whole - made > BESIDE * whole:
        yield Finding(
            "beside the steps",
            f"{duration(whole - made)} of {duration(whole)} went by beside the steps",
            "Evaluations, answers to sample prompts, and saving take that time.",
            "halfbyte train --eval-steps N --save-steps N --eval-samples 0 ...",
            "note",
        )
