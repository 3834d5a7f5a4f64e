"""What the ways in which an adapter begins, and its kinds, gain on the quick start's task, over several seeds.

    python benchmarks/adapters.py                               every kind, three seeds, 57 steps (the whole task)
    python benchmarks/adapters.py --steps 12 --held-out 200 --kinds default,pissa_niter_4

SmolLM2-135M-Instruct learns to tell good reviews from bad ones as in ``examples/quickstart.py``, with the quick preset;
all kinds get the same snippets and the same rate. A seed decides about the adapter's first values and about the order
of the data. ``nothing`` is the base in 4 bits, without an adapter. The first loss is that of the first step's batch,
before any step; the table shows means over the seeds, and the lowest and the highest. What was measured is kept in the
results' file, and not measured again.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import halfbyte
from halfbyte.data import read_examples, tokenize
from halfbyte.evaluate import score_choices
from halfbyte.quiet import quiet
from halfbyte.runs.events import Event, StepMetrics
from halfbyte.train import TrainConfig, fine_tune

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from halfbyte.example.reviews import read_snippets, split, write_chats
from halfbyte.example.sources import MODEL, REVIEWS, convert, fetch
from halfbyte.files import cache_folder

MAX_LENGTH = 256
KINDS: dict[str, dict[str, Any] | None] = {
    "nothing": None,
    "default": {},
    **{name: {"init_lora_weights": name} for name in ("gaussian", "orthogonal", "loftq")},
    **{name: {"init_lora_weights": name} for name in ("pissa_niter_4", "olora", "eva")},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "loraplus 4": {"loraplus_lr_ratio": 4},
    "neftune 5": {"neftune_noise_alpha": 5},
}


def measured(kind: str, seed: int, base: Path, files: tuple[Path, Path], steps: int | None) -> dict[str, Any]:
    """Train one kind of adapter with one seed, and return its figures on the held-out snippets."""
    options, losses = KINDS[kind], []

    def keep(event: Event) -> None:
        if isinstance(event, StepMetrics):
            losses.append(event.loss)

    with tempfile.TemporaryDirectory() as folder:
        opened, begun = base, time.process_time()
        if options is not None:
            common = {"preset": "quick", "max_length": MAX_LENGTH, "max_steps": steps, "seed": seed}
            names = {"model": str(base), "data": str(files[0]), "output": Path(folder, "run")}
            opened = fine_tune(TrainConfig(**names, **common, **options), keep).output
        seconds = time.process_time() - begun
        rows = tokenize(read_examples(files[1]), halfbyte.load_tokenizer(opened), MAX_LENGTH).rows
        score = score_choices(halfbyte.load(opened), rows)
    first, last = (losses[0], statistics.fmean(losses[-5:])) if losses else (None, None)
    return {
        "kind": kind, "seed": seed, "steps": steps, "held_out": len(rows), "processor_seconds": round(seconds, 1),
        "first_loss": first, "last_loss": last, "accuracy": score.accuracy, "loss": score.loss,
    }  # fmt: skip


def spread(values: list[float], form: str) -> str:
    """Return the mean of values with the lowest and the highest."""
    low, mean, high = (format(value, form) for value in (min(values), statistics.fmean(values), max(values)))
    return mean if low == high else f"{mean} ({low} to {high})"


def main() -> None:
    """Measure what is not in the results' file yet, and print the table of all that is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", default=",".join(KINDS), help="names with commas between")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="without it a whole pass")
    parser.add_argument("--train", type=int, default=900)
    parser.add_argument("--held-out", type=int, default=500)
    parser.add_argument("--results", type=Path, default=Path("adapters.jsonl"))
    given = parser.parse_args()
    unknown = [kind for kind in given.kinds.split(",") if kind not in KINDS]
    if unknown:
        parser.error(f"there is no kind {unknown[0]!r}; there is {', '.join(KINDS)}")
    cache = cache_folder()
    base = convert(fetch(MODEL, cache), cache / "SmolLM2-135M-Instruct")
    training, holding_out = split(read_snippets(fetch(REVIEWS, cache)), given.train, given.held_out, 0)
    lines = given.results.read_text().splitlines() if given.results.is_file() else []
    results = [json.loads(line) for line in lines]
    with tempfile.TemporaryDirectory() as folder:
        files = (
            write_chats(training, Path(folder, "train.jsonl")),
            write_chats(holding_out, Path(folder, "held_out.jsonl")),
        )
        for seed in range(given.seeds):
            for kind in given.kinds.split(","):
                known = {(r["kind"], r["seed"], r["steps"], r["held_out"]) for r in results}
                if (kind, seed, given.steps, given.held_out) in known or (kind == "nothing" and seed):
                    continue
                with quiet():
                    results.append(measured(kind, seed, base, files, given.steps))
                with given.results.open("a") as file:
                    file.write(json.dumps(results[-1]) + "\n")
                print(json.dumps(results[-1]), file=sys.stderr)
    print(
        f"{given.steps or 'all'} steps of 16 snippets, {given.held_out} held out, {torch.get_num_threads()} threads\n"
    )
    print("| | right | loss | first loss | processor seconds | seeds |\n|---|---|---|---|---|---|")
    for kind in given.kinds.split(","):
        wanted = (kind, given.steps, given.held_out)
        of_kind = [r for r in results if (r["kind"], r["steps"], r["held_out"]) == wanted]
        if of_kind:
            first = spread([r["first_loss"] for r in of_kind], ".2f") if of_kind[0]["first_loss"] else ""
            cells = [spread([r[name] for r in of_kind], form) for name, form in (("accuracy", ".1%"), ("loss", ".3f"))]
            seconds = spread([r["processor_seconds"] for r in of_kind], ".0f")
            print(f"| {kind} | {cells[0]} | {cells[1]} | {first} | {seconds} | {len(of_kind)} |")


if __name__ == "__main__":
    main()
