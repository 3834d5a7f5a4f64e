"""Teach a small chat model to judge movie reviews, on two CPU cores, in about two minutes.

    make quickstart

SmolLM2-135M-Instruct is loaded in 4 bits (NF4, double quantization) and measured on 500 review snippets that it is
never trained on. LoRA matrices beside its 4-bit weights are then trained on 900 others, and it is measured again. The
adapter, the data and all figures end up in runs/quickstart.

torch and the libraries over it take seconds to import, so they are imported where they are first used.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import halfbyte
from halfbyte.cli.console import TerminalDisplay
from halfbyte.example import HELD_OUT, MAX_LENGTH, SEED, TRAIN
from halfbyte.example.reviews import Snippet, read_snippets, split, write_chats
from halfbyte.example.sources import MODEL, REVIEWS, convert, fetch
from halfbyte.files import append, cache_folder, write_text
from halfbyte.quiet import quiet
from halfbyte.runs.events import Sample, to_line
from halfbyte.runs.folder import RunFolder
from halfbyte.runs.report.writer import write_report
from halfbyte.train import TrainConfig

SAMPLES = 3

console = Console(highlight=False)


def main(output: Path = Path("runs/quickstart"), train: int = TRAIN, held_out: int = HELD_OUT) -> None:
    """Run the quick start with so many snippets to train on and to measure with; leave the results in ``output``."""
    console.rule("1. A model and data")
    cache = cache_folder()
    gguf, ratings = fetch(MODEL, cache), fetch(REVIEWS, cache)
    begun = time.monotonic()
    with timed("Converting the model to a Hugging Face folder, the first time only"):
        base = convert(gguf, cache / "SmolLM2-135M-Instruct")
    training, holding_out = split(read_snippets(ratings), train, held_out, SEED)
    train_file = write_chats(training, output / "data" / "train.jsonl")
    held_out_file = write_chats(holding_out, output / "data" / "held_out.jsonl")
    console.print(f"The model: {base}")
    console.print(f"{train} snippets to train on: {train_file}")
    console.print(f"{held_out} others to measure with: {held_out_file}")

    console.rule("2. The model as it is, in 4 bits")
    samples = holding_out[:SAMPLES]
    before = measure(base, held_out_file, samples)

    console.rule("3. Fine-tuning")
    config = TrainConfig(
        model=str(base),
        data=str(train_file),
        output=output,
        preset="quick",
        max_length=MAX_LENGTH,
        seed=SEED,
        sample_prompts=[],  # answers are written here, before and after
        overwrite=True,
    )
    from halfbyte.train import fine_tune

    run = fine_tune(config, TerminalDisplay(console)).summary

    console.rule("4. The model with its adapter")
    after = measure(output, held_out_file, samples)

    console.rule("5. What came of it")
    seconds = time.monotonic() - begun
    figures = {
        "held_out": held_out,
        "accuracy_before": before.accuracy,
        "accuracy_after": after.accuracy,
        "loss_before": before.loss,
        "loss_after": after.loss,
        "quickstart_seconds": seconds,
    }
    summary = output / "summary.json"
    write_text(summary, json.dumps(json.loads(summary.read_text(encoding="utf-8")) | figures, indent=2) + "\n")
    put_into_report(output, samples, before, after, run.steps)
    console.print(side_by_side(samples, before, after))
    console.print(
        f"Right on {held_out} held-out snippets: {before.accuracy:.1%} before, [bold]{after.accuracy:.1%} after[/].\n"
        f"Loss on them: {before.loss:.3f} before, {after.loss:.3f} after.\n"
        f"{seconds:.0f} s in all, of them {run.seconds:.0f} s of training at {run.trained_tokens_per_second:.1f} "
        f"trained tokens/s; at most {run.peak_memory_bytes / 2**30:.1f} GiB of memory.\n"
    )
    command = Path(sys.prefix, "bin", "halfbyte")
    command = command.relative_to(Path.cwd()) if command.is_relative_to(Path.cwd()) else command
    console.print(f"The adapter is in {output}, with summary.json and report.html, a page to send. What to do next:")
    console.print(f"  {command} chat {output}", soft_wrap=True)
    console.print(
        f"  {command} train --preset quick --model {base} --data your-file.jsonl --output runs/yours", soft_wrap=True
    )


@dataclass(frozen=True)
class Measurement:
    """Accuracy (0 to 1) and loss (nats per answer token) on the held-out snippets, and the samples' answers."""

    accuracy: float
    loss: float
    answers: list[str]


def measure(model_path: Path, held_out: Path, samples: list[Snippet]) -> Measurement:
    """Load a model, or an adapter with its model, and see how it answers."""
    from halfbyte.data import read_examples, tokenize
    from halfbyte.evaluate import score_choices
    from halfbyte.generate import stream_reply

    with timed("Loading"):
        model = halfbyte.load(model_path)
        tokenizer = halfbyte.load_tokenizer(model_path)
    rows = tokenize(read_examples(held_out), tokenizer, MAX_LENGTH).rows
    columns = TextColumn("Measuring"), MofNCompleteColumn(), BarColumn(bar_width=None), TimeElapsedColumn()
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=len(rows))
        score = score_choices(model, rows, progress=lambda done, _: bar.update(task, completed=done))
    console.print(f"{score.accuracy:.1%} right, loss {score.loss:.3f}")
    with timed("Writing sample answers"):
        chats = [[{"role": "user", "content": snippet.question}] for snippet in samples]
        answers = ["".join(stream_reply(model, tokenizer, chat, max_new_tokens=24)) for chat in chats]
    return Measurement(score.accuracy, score.loss, answers)


def side_by_side(samples: list[Snippet], before: Measurement, after: Measurement) -> Table:
    """Put the sample answers into a table."""
    table = Table("snippet", "people said", "before", "after", show_lines=True)
    for snippet, old, new in zip(samples, before.answers, after.answers, strict=True):
        table.add_row(*map(escape, (snippet.text, snippet.answer, old, new)))
    return table


def put_into_report(output: Path, samples: list[Snippet], before: Measurement, after: Measurement, steps: int) -> None:
    """Tell the run of the sample answers, and write its page again, which shows them beside each other."""
    folder = RunFolder(output)
    for step, answers in ((0, before.answers), (steps, after.answers)):
        for snippet, answer in zip(samples, answers, strict=True):
            append(folder.metrics, to_line(Sample(step=step, prompt=snippet.question, answer=answer)))
    write_report(folder)


@contextlib.contextmanager
def timed(what: str) -> Iterator[None]:
    """Show that something is under way, and then how long it took."""
    begun = time.monotonic()
    with console.status(what):
        yield
    console.print(f"{what}: {time.monotonic() - begun:.1f} s")


if __name__ == "__main__":
    os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported
    try:
        with quiet():
            main()
    except halfbyte.InputError as error:
        console.print(f"Error: {error}", style="red", markup=False)
        sys.exit(2)
    except KeyboardInterrupt as interrupt:
        console.print(str(interrupt) or "Interrupted.", markup=False)
        sys.exit(130)
