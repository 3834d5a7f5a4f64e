"""What a 4-bit merge keeps of what was learnt: models, data sets and seeds, at the adapter's scale and at a quarter.

    python benchmarks/kept.py OUT --model NAME=FOLDER ... --data NAME=FILE ... [--seeds 0,1,2]
    python benchmarks/kept.py OUT                    the table of what OUT has

Each file is JSONL with ``prompt`` and ``completion``. Of its rows the first 320 train an adapter (40 steps of 8 rows,
rank 16, alpha 32, learning rate 5e-4), the others, 150 at most, are what ``halfbyte audit`` measures on. The same
adapter is measured once more with its ``lora_alpha`` divided by four. Every audit adds its lines to ``OUT/kept.jsonl``;
what is there is not done again.
"""

import argparse
import itertools
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

TRAINED, HELD_OUT = 320, 150
WAYS = ("nf4-outputs", "nf4-random", "nf4-original", "nf4-nearest")
SCALES = (1.0, 0.25)


def halfbyte(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "halfbyte", *words], check=True, stdout=subprocess.DEVNULL)


def train(model: str, rows: list[str], seed: int, folder: Path) -> tuple[Path, Path]:
    """Return the run and the rows that it has not seen."""
    data, other = folder / "train.jsonl", folder / "other.jsonl"
    data.write_text("\n".join(rows[:TRAINED]) + "\n", encoding="utf-8")
    other.write_text("\n".join(rows[TRAINED : TRAINED + HELD_OUT]) + "\n", encoding="utf-8")
    run = folder / "run"
    options = "--max-steps 40 --batch-size 8 --gradient-accumulation-steps 1 --max-length 128 --rank 16 --lora-alpha 32"
    more = "--learning-rate 5e-4 --eval-samples 0 --no-eval-before --sample-prompts []"
    words = f"train --model {model} --data {data} --output {run} --seed {seed} {options} {more}"
    halfbyte(*words.split())
    return run, other


def scaled(run: Path, scale: float) -> None:
    """Multiply the adapter's ``lora_alpha``."""
    file = run / "adapter_config.json"
    config = json.loads(file.read_text())
    config["lora_alpha"] *= scale
    file.write_text(json.dumps(config))


def audit(run: Path, other: Path, ways: tuple[str, ...], seed: int) -> list[dict[str, Any]]:
    words = [word for way in ways for word in ("--way", way)]
    halfbyte("audit", str(run), "--data", str(other), "--seed", str(seed), *words, "--output", str(run / "audit"))
    return list(json.loads((run / "audit" / "audit.json").read_text())["ways"])


def table(lines: list[dict[str, Any]]) -> str:
    """Median and least share kept, and the median divergences, over the seeds."""
    head = ["model", "data", "scale", "way", "seeds", "kept", "least", "divergence", "on general text", "agreement"]
    out = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]

    def key(line: dict[str, Any]) -> tuple[Any, ...]:
        return line["model"], line["data"], -line["scale"], WAYS.index(line["way"])

    for (model, data, scale, way), group in itertools.groupby(sorted(lines, key=key), key):
        rows = list(group)
        kept = [row["kept"] for row in rows]
        others = (statistics.median(row[name] for row in rows) for name in ("divergence", "elsewhere"))
        agreement = statistics.median(row["agreement"] for row in rows)
        cells = [model, data, f"{-scale:g}", WAYS[way], str(len(rows)), f"{statistics.median(kept):.1%}"]
        cells += [f"{min(kept):.1%}", *(f"{value:.4f}" for value in others), f"{agreement:.1%}"]
        out.append("| " + " | ".join(cells) + " |")
    return "\n".join(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--data", action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--ways", default="nf4-outputs,nf4-random")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "kept.jsonl"
    file.touch()
    done = [json.loads(line) for line in file.read_text().splitlines()]
    ways = tuple(options.ways.split(","))
    for seed, (model, folder), (data, rows) in itertools.product(
        [int(seed) for seed in options.seeds.split(",")],
        [pair.split("=", 1) for pair in options.model],
        [pair.split("=", 1) for pair in options.data],
    ):
        cell = {"model": model, "data": data, "seed": seed}
        scales = [
            scale for scale in SCALES if not any((cell | {"scale": scale}).items() <= old.items() for old in done)
        ]
        if not scales:
            continue
        with tempfile.TemporaryDirectory(dir=options.out) as place:
            run, other = train(folder, Path(rows).read_text(encoding="utf-8").splitlines(), seed, Path(place))
            for scale in scales:
                copy = shutil.copytree(run, Path(place) / f"run-{scale:g}")
                scaled(copy, scale)
                found = [
                    cell | {"scale": scale, "way": way["name"]} | {name: way[name] for name in FIGURES}
                    for way in audit(copy, other, ways, seed)
                ]
                with file.open("a") as log:
                    log.writelines(json.dumps(line) + "\n" for line in found)
                done += found
                print(json.dumps([(line["way"], round(line["kept"], 4)) for line in found]), cell, scale, flush=True)
    print(table([line for line in done if line["way"] in WAYS]))


FIGURES = ("kept", "loss", "divergence", "elsewhere", "agreement", "accuracy")

if __name__ == "__main__":
    main()
