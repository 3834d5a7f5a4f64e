"""Training a base that does not fit: speed and memory under hard limits that count the page cache.

    python benchmarks/beyond.py OUT --shape 7b --memory none,4GiB,2GiB [--rows 8] [--tokens 256] [--rounds 1]
    python benchmarks/beyond.py OUT                    the table of what OUT has
    python benchmarks/beyond.py OUT --picture FILE     and speed over the memory left for the base, as a picture

Each run is ``halfbyte train`` in a process of its own, in a memory control group (version 1, so Linux and root) with
that limit; before it the page cache is dropped. The model's weights are random bytes (:mod:`halfbyte.bench.shapes`),
its rows random text, one a micro-batch. A run makes ``--steps`` steps; the median of those behind the first is taken,
or the first where there is no other. Every run adds a line to ``OUT/beyond.jsonl``; what is there is not done again.
"""

import argparse
import itertools
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from pydantic import ByteSize, TypeAdapter

from halfbyte.bench.process import _anonymous
from halfbyte.bench.shapes import write_4bit_model
from halfbyte.runs.circumstances import kernels_in_force

GROUPS = Path("/sys/fs/cgroup/memory")
STAYS = re.compile(r"read from its file as it is used, (\S+ \S+) of it in memory at a time")
WAITED = re.compile(r"(\S+ \S+) of the base were read .* at (\S+ \S+)/s; (\S+)% of the time")


def rows(file: Path, count: int, tokens: int) -> None:
    """Write rows of so many tokens: bytes of text, and one that ends it."""
    letters = random.Random(0)
    texts = ("".join(letters.choices("abcdefghij     ", k=tokens - 1)) for _ in range(count))
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def train(model: Path, place: Path, memory: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run one training under a limit and return what was measured."""
    rows(place / "rows.jsonl", options.rows * options.steps, options.tokens)
    group = GROUPS / f"halfbyte-beyond-{os.getpid()}"
    group.mkdir()
    if memory != "none":
        (group / "memory.limit_in_bytes").write_text(str(TypeAdapter(ByteSize).validate_python(memory)))
    Path("/proc/sys/vm/drop_caches").write_text("3")
    words = f"train --model {model} --data {place / 'rows.jsonl'} --output {place / 'run'} --max-steps {options.steps} "
    words += f"--batch-size 1 --gradient-accumulation-steps {options.rows} --max-length {options.tokens} "
    words += f"--rank {options.rank} --optimizer {options.optimizer} --eval-samples 0 --no-eval-before --no-packing"
    words += " --sample-prompts []"
    begin = f"echo $$ > {group}/cgroup.procs; exec {sys.executable} -m halfbyte {words}"
    process = subprocess.Popen(["sh", "-c", begin], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    peak = 0
    while process.poll() is None:
        peak = max(peak, _anonymous(process.pid))
        time.sleep(0.02)
    told = process.stderr.read() if process.stderr else ""
    most = int((group / "memory.max_usage_in_bytes").read_text())
    group.rmdir()
    if process.returncode:
        return {"error": told.strip().splitlines()[-1]}
    events = [json.loads(line) for line in (place / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [event for event in events if event.get("kind") == "step"]
    ends = [0.0, *(step["elapsed"] for step in steps)]
    seconds = [after - before for before, after in itertools.pairwise(ends)]
    notes = [event["text"] for event in events if event.get("kind") == "note"]
    waited = next((found for note in notes if (found := WAITED.search(note))), None)
    plan = next(note for note in notes if note.startswith("Activations"))
    stays = STAYS.search(plan)
    base = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    return {
        "seconds": statistics.median(seconds[1:] or seconds),
        "every": seconds,
        "losses": [step["loss"] for step in steps],
        "anonymous": peak,
        "most": most,
        "plan": plan,
        "base": base,
        "stays": TypeAdapter(ByteSize).validate_python(stays[1]) / base if stays else 1.0,
        "read": waited and waited[1],
        "waited": float(waited[3]) / 100 if waited else 0.0,
    }


def table(lines: list[dict[str, Any]]) -> str:
    """Return the runs as a table; of those of a shape that have the same work, how fast they are beside no limit."""
    head = ["shape", "tokens a step", "limit", "s a step", "of no limit", "left for the base", "waited for the disk"]
    head += ["anonymous", "in all"]
    out = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    free = {(line["shape"], line["work"]): line["seconds"] for line in lines if line["memory"] == "none"}
    for line in lines:
        if "error" in line:
            out.append(f"| {line['shape']} | {line['work']} | {line['memory']} | {line['error']} |")
            continue
        least = free.get((line["shape"], line["work"]))
        cells = [line["shape"], line["work"], line["memory"], f"{line['seconds']:.1f}"]
        stays = f"{left(line):.0%}" if "base" in line else ""
        cells += [f"{least / line['seconds']:.2f}" if least else "", stays, f"{line['waited']:.1%}"]
        cells += [f"{line[name] / 2**30:.2f} GiB" for name in ("anonymous", "most")]
        out.append("| " + " | ".join(cells) + " |")
    return "\n".join(out)


def left(line: dict[str, Any]) -> float:
    """Return what a limit left for the base beside what the process allocated at its peak, as a share of its file."""
    if line["memory"] == "none":
        return 1.0
    return float(min(1.0, (TypeAdapter(ByteSize).validate_python(line["memory"]) - line["anonymous"]) / line["base"]))


def draw(lines: list[dict[str, Any]], file: Path) -> None:
    """Draw how fast each shape's steps are, by that without a limit, over the memory that was left for the base."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    lines = [line for line in lines if "base" in line]
    for shape, work in dict.fromkeys((line["shape"], line["work"]) for line in lines):
        ours = [line for line in lines if (line["shape"], line["work"]) == (shape, work)]
        unlimited = [line["seconds"] for line in ours if line["memory"] == "none"]
        if not unlimited:
            continue
        free = statistics.median(unlimited)
        points = sorted((100 * left(line), free / line["seconds"]) for line in ours)
        axes.plot(*zip(*points, strict=True), "o-", label=f"{shape}, steps of {work} tokens")
    axes.set(xlabel="memory left for the base, % of its file", ylabel="speed, by that without a limit", xlim=(0, 102))
    axes.set_ylim(0, 1.1)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape")
    parser.add_argument("--model", type=Path, help="folder of the shape's model, if there is one already")
    parser.add_argument("--memory", default="none,4GiB")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--optimizer", default="paged_adamw_8bit")
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "beyond.jsonl"
    file.touch()
    done = [json.loads(line) for line in file.read_text().splitlines()]
    with tempfile.TemporaryDirectory(dir=options.out) as place:
        model = options.model
        if options.shape and model is None:
            model = Path(place) / "model"
            write_4bit_model(options.shape, model)
        for number in range(options.rounds if options.shape else 0):
            for memory in options.memory.split(","):
                cell = {"shape": options.shape, "work": f"{options.rows}×{options.tokens}", "memory": memory}
                cell |= {"round": number, "rank": options.rank}
                if any(cell.items() <= line.items() for line in done):
                    continue
                with tempfile.TemporaryDirectory(dir=options.out) as run:
                    found = cell | {"kernels": kernels_in_force()} | train(model, Path(run), memory, options)
                with file.open("a") as log:
                    log.write(json.dumps(found) + "\n")
                done.append(found)
                print(json.dumps(found), flush=True)
    print(table(done))
    if options.picture:
        draw(done, options.picture)


if __name__ == "__main__":
    main()
