"""A training script that was written for one GPU, unchanged under ``halfbyte run``, beside it over bitsandbytes.

    python benchmarks/dropin.py --model FOLDER --reviews FILE [--rows 480] [--rounds 3]

``dropin/listing.py`` is the script, ``dropin/listing_bitsandbytes.py`` the same with the few lines changed that keep it
from running on a CPU without halfbyte. The rows are review snippets (the quick start's, MODEL and ratings as it leaves
them in its cache) in alpaca's columns. Both run in turns, each in a process of its own. Told are samples/s as the
trainer counts them, from the first step to the last; the losses at each step that is logged; and the highest anonymous
memory of the process above what it is once torch and the libraries over it are imported.
"""

import argparse
import ast
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER.parent / "examples"))
IMPORTS = "import torch, datasets, transformers, peft, trl; from trl import SFTTrainer; from peft import PeftModel"
SAMPLING = 0.05


def anonymous(pid: int) -> int:
    """Return the anonymous memory of a process in bytes; 0 once it is gone."""
    try:
        found = re.search(r"^RssAnon:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return 1024 * int(found[1]) if found else 0


def run(command: list[str], folder: str, environment: dict[str, str]) -> tuple[str, int]:
    """Return what a command printed and its highest anonymous memory.

    Raises:
        RuntimeError: it failed.
    """
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT)
        peak = 0
        while process.poll() is None:
            peak = max(peak, anonymous(process.pid))
            time.sleep(SAMPLING)
        output.seek(0)
        text = output.read()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{text[-3000:]}")
    return text, peak


def logged(text: str) -> list[dict[str, float]]:
    """Return what the trainer logged, in order."""
    found = re.findall(r"\{'(?:loss|train_runtime)'[^}]*\}", text)
    return [{key: float(value) for key, value in ast.literal_eval(line).items()} for line in found]


def main() -> None:
    """Write the data, run both in turns, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", required=True, type=Path, help="a model folder")
    parser.add_argument("--reviews", required=True, type=Path, help="the ratings' file of the quick start")
    parser.add_argument("--rows", type=int, default=480)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="a JSON file for the numbers")
    options = parser.parse_args()
    from halfbyte.example.reviews import QUESTION, read_snippets

    sides = {
        "halfbyte": [sys.executable, "-m", "halfbyte", "run", str(FOLDER / "dropin" / "listing.py")],
        "bitsandbytes": [sys.executable, str(FOLDER / "dropin" / "listing_bitsandbytes.py")],
    }
    found: dict[str, list[dict[str, object]]] = {name: [] for name in sides}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "rows.jsonl"
        snippets = read_snippets(options.reviews)[: options.rows]
        rows = ({"instruction": QUESTION.strip(), "input": one.text, "output": one.answer} for one in snippets)
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        environment = os.environ | {"MODEL": str(options.model.resolve()), "DATA": str(data), "TQDM_DISABLE": "1"}
        _, imported = run([sys.executable, "-c", IMPORTS], folder, environment)
        for number in range(options.rounds):
            for name, command in sides.items():
                print(f"round {number + 1} of {options.rounds}, {name}", file=sys.stderr)
                text, peak = run(command, folder, environment)
                *steps, end = logged(text)
                found[name].append(
                    {
                        "samples_per_second": end["train_samples_per_second"],
                        "losses": [step["loss"] for step in steps if "loss" in step],
                        "peak_bytes": peak - imported,
                    }
                )
    for name, rounds in found.items():
        rates = [one["samples_per_second"] for one in rounds]
        peaks = [one["peak_bytes"] / 1e9 for one in rounds]
        print(
            f"{name:13} {statistics.median(rates):6.2f} samples/s  {max(peaks):5.2f} GB  losses {rounds[0]['losses']}"
        )
    pairs = list(zip(found["halfbyte"], found["bitsandbytes"], strict=True))
    ratios = [own["samples_per_second"] / other["samples_per_second"] for own, other in pairs]
    apart = [abs(a / b - 1) for own, other in pairs for a, b in zip(own["losses"], other["losses"], strict=True)]
    print(f"{statistics.median(ratios):.2f} times the samples/s ({', '.join(f'{x:.2f}' for x in sorted(ratios))}); "
          f"losses at most {max(apart):.2%} apart")  # fmt: skip
    if options.output:
        options.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
