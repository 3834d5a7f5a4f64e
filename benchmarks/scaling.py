"""What a step takes with threads, with processes, and with more accumulation, over the same rows.

    python benchmarks/scaling.py                  a table, and a line of JSON for each way

SmolLM2-135M-Instruct in nf4, LoRA of rank 16 on every linear layer, bf16, AdamW with 32-bit state, eight rows a step of
some 150 tokens. Each way is a run of its own of ``halfbyte train``, in turns; its time is the median of its steps but
the first, by the clock of the run's ``metrics.jsonl``.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from halfbyte.example.sources import MODEL, convert, fetch
from halfbyte.files import cache_folder

WORDS = "a model that is trained by several processes reads the rows of its share and adds up what all of them found"
WAYS = {  # processes, threads of each, rows a pass, passes a step
    "1 process, 2 threads": (1, 2, 4, 2),
    "1 process, 1 thread": (1, 1, 4, 2),
    "1 process, 2 threads, more accumulation": (1, 2, 2, 4),
    "2 processes, 1 thread each": (2, 1, 4, 1),
    "2 processes, 1 thread each, more accumulation": (2, 1, 2, 2),
}


def rows(file: Path) -> Path:
    """Write 64 rows of like length to ``file``."""
    words = WORDS.split()
    texts = [" ".join(words[(i * 7 + j) % len(words)] for j in range(110)) for i in range(64)]
    file.write_text("".join(json.dumps({"prompt": "Say it.", "completion": text}) + "\n" for text in texts))
    return file


def step_seconds(model: Path, data: Path, output: Path, way: tuple[int, int, int, int], steps: int) -> float:
    """Train, and return the median seconds of a step but the first."""
    processes, threads, batch, accumulation = way
    options = {
        "model": model,
        "data": data,
        "output": output,
        "processes": processes,
        "batch-size": batch,
        "gradient-accumulation-steps": accumulation,
        "max-steps": steps,
        "rank": 16,
        "optimizer": "adamw_32bit",
        "seed": 0,
    }
    flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "halfbyte", "train", *flags, "--overwrite"]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    subprocess.run(command, env=environment, check=True, capture_output=True)
    events = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    times = [event["elapsed"] for event in events if event["kind"] == "step"]
    return statistics.median(after - before for before, after in itertools.pairwise(times))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    given = parser.parse_args()
    model = convert(fetch(MODEL, cache_folder()), cache_folder() / "SmolLM2-135M-Instruct")
    found: dict[str, list[float]] = {name: [] for name in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        data = rows(Path(folder) / "rows.jsonl")
        for _ in range(given.rounds):
            for name, way in WAYS.items():
                found[name].append(step_seconds(model, data, Path(folder) / "run", way, given.steps))
    for name, seconds in found.items():
        print(f"{name:48} {statistics.median(seconds):6.2f} s a step")
        print(json.dumps({"way": name, "seconds": seconds, "load": os.getloadavg()[0]}))


if __name__ == "__main__":
    main()
