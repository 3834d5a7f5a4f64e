"""A run by its folder: what became of it, whether it learnt, forgot or diverged (:mod:`.speed`: why it was slow).

What the run itself has said of trouble (``halfbyte.train.notices``) stands among its events, and is told again. The
rest is read from its numbers, and from its adapter's file. Nothing in the folder is changed.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import fmean, median

from halfbyte.errors import InputError, counted, size_text
from halfbyte.plan.doctor import speed
from halfbyte.plan.doctor.finding import Finding, looked
from halfbyte.runs.events import Checkpoint, Evaluation, StepMetrics
from halfbyte.runs.folder import RunFolder
from halfbyte.runs.history import Run, read_run
from halfbyte.runs.report.words import changes

FEW_STEPS = 10
FEW_TOKENS = 2000
"""Trained tokens with which hardly anything is learnt."""
WINDOW = 10
"""Steps whose losses are taken together."""
SAME = 0.98
"""Share of its first loss from which on a loss counts as the same."""
LESS = 0.8
"""Share of its first loss below which something was learnt, however little was trained on."""
RISEN = 1.3
"""How many times its first loss one is that has risen."""
WORSE = 1.02
"""How many times its best held-out loss the last one is where a run has learnt by heart."""
FORGOT = 0.05
"""By which share of it the loss on general text may rise."""
CUT = 0.1
"""Share of rows that are cut to be told."""
TWICE = 0.2
"""Share of rows that are there twice to be told."""
NEARLY_ALL = 0.9
"""Share of the memory with which a process that ends without a word was most likely killed for it."""


def examine(path: Path, progress: Callable[[int, int], None] = lambda *_: None) -> list[Finding]:
    """Look at the run in the folder ``path``.

    Raises:
        InputError: it is no run folder, or one of a newer layout.
    """
    run = read_run(path)
    findings = [
        Finding("files", problem, "What it would tell is missing below.", "", "warning") for problem in run.problems
    ]
    for what, look in (
        ("state", lambda: state(run)),
        ("checkpoints", lambda: checkpoints(run)),
        ("said by the run", lambda: said(run)),
        ("loss", lambda: loss(run)),
        ("learnt", lambda: learnt(run)),
        ("held-out loss", lambda: overfitted(run)),
        ("forgot", lambda: forgot(run)),
        ("data", lambda: data(run)),
        ("speed", lambda: speed.check(run)),
    ):
        findings += looked(what, look)
    if RunFolder(path).adapter.is_file():
        findings += looked("adapter", lambda: _adapter(path, progress))
    return findings


def _adapter(path: Path, progress: Callable[[int, int], None]) -> Iterator[Finding]:
    from halfbyte.plan.doctor.adapter import examine as adapter

    yield from adapter(path, progress)


def state(run: Run) -> Iterator[Finding]:
    """Yield what has become of it."""
    made = f"{run.step:,}{f' of {run.total_steps:,}' if run.total_steps else ''} steps"
    resume = f"halfbyte resume {run.path}"
    if run.state == "running":
        yield Finding("state", f"it goes on: {made} so far")
    elif run.state == "finished":
        yield Finding("state", f"finished: {made}")
    elif run.state == "interrupted":
        yield Finding("state", f"interrupted after {made}", "It goes on where it was.", resume, "note")
    elif run.state == "failed":
        why = "It ended with that error; resuming it as it is ends there again, unless the cause is gone."
        yield Finding("state", f"failed after {made}: {run.error or 'it does not say why'}", why, resume, "fault")
    else:
        peak, there = run.peak_memory or 0, run.circumstances.get("memory_bytes") or 0
        cause = (
            f"Its process had {size_text(peak)} of the machine's {size_text(there)} and was most likely killed for it."
            if there and peak > NEARLY_ALL * there
            else "Its process ended without a word: killed (for memory, or by a scheduler), or the machine went down."
        )
        yield Finding("state", f"broken off after {made}", cause, resume, "warning")


def checkpoints(run: Run) -> Iterator[Finding]:
    """Yield what a run that is not finished can go on from."""
    folder = RunFolder(run.path)
    if run.state in ("finished", "running"):
        return
    if not folder.saved():
        told = [one.folder for one in run.of(Checkpoint)]
        yield Finding(
            "checkpoints",
            f"none{f', though {told[-1]} was written' if told else ''}",
            "Resuming it begins at step 1 again.",
            "Set save_steps or save_minutes lower than what may be lost.",
            "warning" if run.step else "note",
        )
        return
    try:
        found, damaged = folder.checkpoint()
    except InputError as error:
        yield Finding("checkpoints", str(error), "It cannot be resumed.", "Put one back from a copy.", "fault")
        return
    for line in damaged:
        why = "It was written to, or only in part: the one before it is taken."
        yield Finding("checkpoints", line, why, f"halfbyte resume {run.path}", "warning")
    if found:
        yield Finding("checkpoints", f"{found.name} is whole: the run goes on from there")


def said(run: Run) -> Iterator[Finding]:
    """Yield what the run has said of trouble."""
    for sentence in run.troubles:
        yield Finding("said by the run", sentence, "It was said while it trained.", "", "warning")


def loss(run: Run) -> Iterator[Finding]:
    """Yield whether training diverged."""
    losses = [step.loss for step in run.steps]
    odd = next(
        (step.step for step in run.steps if not math.isfinite(step.loss) or not math.isfinite(step.grad_norm)), None
    )
    rate = max((step.learning_rate for step in run.steps), default=0.0)
    lower = f"halfbyte train --learning-rate {rate / 5:.1g} ...  # it was {rate:g}"
    if odd is not None:
        yield Finding("loss", f"is no number at step {odd:,}", "What was learnt before it is lost.", lower, "fault")
        return
    if "diverged" in run.error:
        norms = [step.grad_norm for step in run.steps[-WINDOW:]]
        grown = f"; the gradient's norm was {norms[-1]:.3g} at last" if norms else ""
        why = "A step whose loss or gradient is no number is not made: the adapter of the last checkpoint is whole."
        yield Finding("loss", f"the run diverged{grown}", why, lower, "fault")
        return
    if len(losses) < 2 * WINDOW:
        return
    first, last = fmean(losses[:WINDOW]), fmean(losses[-WINDOW:])
    if last > RISEN * first:
        why = "Training diverges: each step makes the model worse."
        yield Finding("loss", f"rose from {first:.3f} to {last:.3f}", why, lower, "warning")


def learnt(run: Run) -> Iterator[Finding]:
    """Yield why a run may have learnt nothing."""
    steps = run.steps
    if not steps:
        if run.state != "running":
            yield Finding("learnt", "no step was made", "The adapter is as it began.", "", "warning")
        return
    if not any(step.learning_rate for step in steps):
        yield Finding(
            "learnt",
            "the learning rate was 0 in every step",
            "Nothing is learnt without one.",
            "halfbyte train --learning-rate 2e-4 ...",
            "fault",
        )
        return
    losses = [step.loss for step in steps]
    trained = steps[-1].trained_tokens
    window = min(WINDOW, max(1, len(losses) // 3))
    first, last = fmean(losses[:window]), fmean(losses[-window:])
    is_little = len(steps) < FEW_STEPS or (trained < FEW_TOKENS and last > LESS * first)
    if is_little and run.state != "running" and run.options.get("task") != "classify":
        yield Finding(
            "learnt",
            f"{counted(len(steps), 'step')} over {trained:,} trained tokens in all",
            "That is too little to learn more than the form of an answer.",
            "halfbyte train --epochs 5 ...  # or --max-steps, or more data",
            "note",
        )
    if len(steps) >= FEW_STEPS and SAME * first < last <= RISEN * first:
        rate = max(step.learning_rate for step in steps)
        yield Finding(
            "learnt",
            f"the loss stayed as it was: {first:.3f} at first, {last:.3f} at last",
            "The learning rate is too low, the model knows the data already, or the labels say nothing.",
            f"halfbyte train --learning-rate {rate * 5:.1g} ...  # it was {rate:g}; halfbyte data shows the labels",
            "warning",
        )
    else:
        yield Finding("learnt", f"training loss {first:.3f} → {last:.3f}")
    limit = run.options.get("max_grad_norm")
    norms = [step.grad_norm for step in steps]
    if isinstance(limit, (int, float)) and limit and len(norms) >= FEW_STEPS and median(norms) < 1e-6:
        yield Finding(
            "learnt",
            f"the gradient's norm was {median(norms):.1g}",
            "No gradient reaches the adapter: its modules take no part in what is trained.",
            "halfbyte train --target-modules all-linear ...",
            "warning",
        )


def overfitted(run: Run) -> Iterator[Finding]:
    """Yield whether the run has learnt its rows by heart."""
    measured = _figures(run.evaluations, "loss")
    trained = [(step, value) for step, value in measured if step]
    if not trained:
        told = [f"{name} {before:.3g} → {after:.3g}" for name, before, after in changes(run)]
        if told:
            yield Finding("held-out rows", "; ".join(told))
        elif run.steps and run.state == "finished":
            yield Finding(
                "held-out loss",
                "not measured",
                "Nobody knows whether the run has learnt its task or its rows.",
                "halfbyte train --eval-data FILE ...  # or --eval-share 0.05",
                "note",
            )
        return
    best_step, best = min(trained, key=lambda pair: pair[1])
    last_step, last = trained[-1]
    before = dict(measured).get(0)
    if before is not None and best >= before:
        yield Finding(
            "held-out loss",
            f"{before:.3f} before training and never lower after it ({best:.3f} at best)",
            "What was learnt does not help with rows that were not trained on.",
            "Look whether training and held-out rows are of one kind (halfbyte data), and take a lower learning rate.",
            "warning",
        )
    elif last > WORSE * best and run.adapter_step >= last_step and _falls(run.steps, best_step):
        yield Finding(
            "held-out loss",
            f"best at step {best_step:,} ({best:.3f}), {last:.3f} at last, while that of training fell",
            "The run learns its rows by heart; the adapter that it left is the last one, not the best.",
            "halfbyte train --keep-best --early-stopping-patience 2 ...  # or fewer --epochs",
            "warning",
        )
    else:
        yield Finding("held-out loss", f"{f'{before:.3f} → ' if before is not None else ''}{last:.3f}")


def _falls(steps: Sequence[StepMetrics], since: int) -> bool:
    until = [step.loss for step in steps if step.step <= since][-WINDOW:]
    after = [step.loss for step in steps if step.step > since][-WINDOW:]
    return bool(until and after) and fmean(after) < fmean(until)


def forgot(run: Run) -> Iterator[Finding]:
    """Yield whether the loss on general text has risen."""
    measured = _figures(run.evaluations, "general_loss")
    if not measured:
        if run.state == "finished" and run.options.get("task", "lm") == "lm":
            yield Finding(
                "forgot",
                "not measured",
                "Training on a narrow task may cost the model what it knew.",
                "halfbyte train --forgetting-data builtin ...",
                "note",
            )
        return
    (_, first), (_, last) = measured[0], measured[-1]
    if last > first * (1 + FORGOT):
        yield Finding(
            "forgot",
            f"the loss on general text rose from {first:.3f} to {last:.3f}",
            "The model has lost some of what it knew before.",
            "halfbyte train --replay FILE ...  # general rows; or a lower --learning-rate, fewer --epochs",
            "warning",
        )
    else:
        yield Finding("forgot", f"loss on general text {first:.3f} → {last:.3f}")


def _figures(evaluations: Sequence[Evaluation], name: str) -> list[tuple[int, float]]:
    return [(one.step, one.figures[name]) for one in evaluations if name in one.figures]


def data(run: Run) -> Iterator[Finding]:
    """Yield what of its rows stands in the way."""
    about = run.data
    if about is None:
        return
    if about.truncated > CUT * max(about.examples, 1):
        yield Finding(
            "data",
            f"{about.truncated:,} of {about.examples:,} rows were cut to their greatest length",
            "What was cut off is often the end of the answer: the model learns to break off.",
            f"halfbyte train --max-length N ...  # it was {run.options.get('max_length', 'the default')}",
            "warning",
        )
    if about.repeated and about.repeated > TWICE * about.rows:
        yield Finding(
            "data",
            f"{about.repeated:,} of {about.rows:,} rows are equal to an earlier one",
            "Such rows are learnt by heart; among held-out ones they make a run look better than it is.",
            "sort -u DATA.jsonl > UNIQUE.jsonl",
            "note",
        )
    if left := sum(about.left_out.values()):
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in about.left_out.items())
        why = "What is left out is not learnt."
        yield Finding("data", f"{left:,} rows were left out: {kinds}", why, f"cat {run.path / 'skipped.jsonl'}", "note")
