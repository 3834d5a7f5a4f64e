"""The paper's Figure 6: memory of training by part, measured on random models in 4 bits, and what the plan says.

Each trial trains twice, in processes of their own. One is a loop over the public API, which stops where each part comes
to be; what of anonymous memory is more (or, of gradients, less) than at the stop before is the part:

    base          resident pages of its files behind the last step, and anonymous memory that loading took
    adapter       get_peft_model and prepare
    state         the optimizer's first step
    gradients     what is given back when they are dropped
    activations   the peak of the first step (read every 5 ms) less what is there before it and less the gradients
    process       the rest of the peak: Python's objects, the heap's gaps, what the pool holds unused

The other is ``halfbyte train``'s own way with the same options; its peak is what the plan's is held to.
"""

import ctypes
import gc
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lab import Book, book, markdown
from matplotlib.figure import Figure

from halfbyte.quiet import quiet

CLAIMED = ("base", "adapter", "gradients", "state")
PARTS = ("base", "adapter", "gradients", "state", "activations", "process")
COLORS = ("#7f8fa9", "#d1495b", "#edae49", "#66a182", "#2e4057", "#c9cbd3")
PAPER = {"base": 5048e6, "adapter": 26e6, "inputs": 18e6, "kept": 567e6}
"""Of 7B on FLAN v2, one sequence; ``inputs``: with gradient checkpointing, ``kept``: without."""
TOKENS_7B = (69, 512)
"""The first: of as many tokens the inputs of 32 layers of width 4096 are the paper's 18 MB."""
TOLERANCE, PART_TOLERANCE, SLACK = 0.05, 0.10, 8 * 2**20
MB, STEPS, SAMPLING, DPI = 1e6, 2, 0.005, 110
WORDS = "the small river runs over old stones while two birds sing and nobody writes "


@dataclass(frozen=True)
class Shape:
    """What is trained: a model of :mod:`halfbyte.bench.shapes`, rows of so many tokens, a rank, how layers are kept."""

    model: str
    rows: int
    tokens: int
    rank: int
    recompute: bool = False

    @property
    def name(self) -> str:
        """What pictures call it."""
        return f"{self.model}, {self.rows}×{self.tokens}, rank {self.rank}" + (", recomputed" * self.recompute)


SHAPES = (
    Shape("135m", 4, 128, 16), Shape("135m", 4, 512, 64),
    Shape("1b", 1, 512, 16), Shape("1b", 1, 512, 16, recompute=True),
)  # fmt: skip
SMALL = Shape("135m", 1, 64, 16)


def anonymous() -> int:
    """Return the bytes of this process that no file backs."""
    found = re.search(r"^RssAnon:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found
    return 1024 * int(found[1])


def resident() -> int:
    """Return the bytes of mapped safetensors that are in memory."""
    inside, found = False, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"^[0-9a-f]+-[0-9a-f]+ ", line):
            inside = line.endswith(".safetensors")
        elif inside and line.startswith("Rss:"):
            found += 1024 * int(line.split()[1])
    return found


def settled() -> int:
    """Return the anonymous memory after what is free was given back to the system."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return anonymous()


@contextmanager
def watched() -> Iterator[list[int]]:
    """Keep the highest anonymous memory of a while in a list of one."""
    peak, done = [anonymous()], threading.Event()

    def look() -> None:
        while not done.wait(SAMPLING):
            peak[0] = max(peak[0], anonymous())

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()


def loop(folder: Path, shape: Shape) -> dict[str, Any]:
    """Train two steps, and return the parts."""
    import torch
    from peft import LoraConfig, get_peft_model

    import halfbyte

    torch.manual_seed(0)
    halfbyte.load(folder)  # so that what is imported for it counts as imports
    imported = settled()
    model: Any = halfbyte.load(folder)
    loaded = settled()
    model = halfbyte.prepare(get_peft_model(model, LoraConfig(**lora(shape))))
    model.train()
    if shape.recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adapted = settled()
    optimizer = halfbyte.optim.AdamW(trained, lr=1e-4, state_bits=8)
    ids = torch.randint(4, 200, (shape.rows, shape.tokens))
    found: dict[str, Any] = {"trained": sum(parameter.numel() for parameter in trained)}
    highest = []
    for step in range(STEPS):
        before = settled()
        with watched() as peak:
            model(input_ids=ids, labels=ids).loss.backward()
        held = settled()
        optimizer.step()
        stepped = settled()
        optimizer.zero_grad(set_to_none=True)
        if step == 0:
            gradients = stepped - settled()
            found |= {"state": stepped - held, "gradients": gradients, "activations": peak[0] - before - gradients}
        highest.append(peak[0])
    found |= {"base": loaded - imported + resident(), "adapter": adapted - loaded}
    found["peak"] = max(highest) - imported + resident()
    return found | {"process": found["peak"] - sum(found[name] for name in PARTS[:5])}


def lora(shape: Shape) -> dict[str, Any]:
    """Return PEFT's options."""
    return {"r": shape.rank, "lora_alpha": 2 * shape.rank, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def options(folder: Path, place: Path, shape: Shape) -> dict[str, Any]:
    """Return the options of ``halfbyte train``, and write its rows."""
    rows = [json.dumps({"text": (WORDS * 60)[i : i + 2 * shape.tokens + 8]}) for i in range(shape.rows * STEPS)]
    (place / "rows.jsonl").write_text("\n".join(rows) + "\n")
    return {
        "model": str(folder), "data": str(place / "rows.jsonl"), "output": str(place / "run"), "rank": shape.rank,
        "lora_alpha": 2 * shape.rank, "lora_dropout": 0.0, "max_steps": STEPS, "batch_size": shape.rows,
        "gradient_accumulation_steps": 1, "max_length": shape.tokens, "save_steps": STEPS + 1, "sample_prompts": [],
        "optimizer": "adamw_8bit", "gradient_checkpointing": shape.recompute, "overwrite": True,
    }  # fmt: skip


def train(folder: Path, shape: Shape) -> dict[str, Any]:
    """Run ``halfbyte train``, and return its peak."""
    from halfbyte.runs.events import StepMetrics
    from halfbyte.train import TrainConfig, fine_tune

    mapped = [0]

    def listen(event: Any) -> None:
        if isinstance(event, StepMetrics):
            mapped[0] = resident()

    imported = anonymous()
    with tempfile.TemporaryDirectory() as place, watched() as peak:
        fine_tune(TrainConfig(**options(folder, Path(place), shape)), listen)
    return {"peak": peak[0] - imported + mapped[0]}


def planned(folder: Path, shape: Shape) -> dict[str, int]:
    """Return the parts that the plan foretells, activations in one."""
    from halfbyte.plan.estimate import plan_run
    from halfbyte.runs.config import TrainConfig

    with tempfile.TemporaryDirectory() as place:
        config = TrainConfig(**options(folder, Path(place), shape))
        memory = plan_run(config, length=shape.tokens).memory
    parts = memory.parts()
    activations = {"activations": parts["kept"] + parts["inputs"] + parts["work"]}
    return {name: value for name, value in (parts | activations).items() if name in PARTS} | {"peak": memory.peak}


def in_a_process(way: str, folder: Path, shape: Shape) -> dict[str, Any]:
    """Do a measurement in a process of its own."""
    command = [sys.executable, __file__, "--child", json.dumps([way, str(folder), asdict(shape)])]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measured(shape: Shape) -> dict[str, Any]:
    """Return what a trial keeps."""
    from halfbyte.bench.shapes import write_4bit_model

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        write_4bit_model(shape.model, folder)
        return {
            "measured": in_a_process("loop", folder, shape),
            "trained": in_a_process("train", folder, shape),
            "planned": planned(folder, shape),
        }


def foretold_7b(tokens: int, recompute: bool) -> dict[str, Any]:
    """Return what the plan says of 7B, by all of its parts: one row, rank 64, nothing loaded."""
    from halfbyte.plan.estimate import plan_run
    from halfbyte.runs.config import TrainConfig

    with tempfile.TemporaryDirectory() as place:
        from transformers import LlamaConfig

        config = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
        config.architectures = ["LlamaForCausalLM"]
        config.save_pretrained(place)
        shape = Shape(place, 1, tokens, 64, recompute)
        plan = plan_run(TrainConfig(**options(Path(place), Path(place), shape)), length=tokens, free=2**40)
    return {"parts": plan.memory.parts(), "lora_parameters": plan.trained}


def measure(lab: Book, shapes: tuple[Shape, ...]) -> None:
    """Do the trials."""
    for shape in shapes:
        lab.trial({"shape": shape.name}, partial(measured, shape))
    for tokens in TOKENS_7B:
        for recompute in (False, True):
            lab.trial(
                {"plan of": "7B", "tokens": tokens, "recompute": recompute}, partial(foretold_7b, tokens, recompute)
            )


def table(lab: Book) -> str:
    """Return the parts, measured and foretold."""
    rows = []
    for line in lab.lines():
        if "shape" in line:
            found, plan = line["measured"], line["planned"]
            cells = [f"{found[name] / MB:.0f} / {plan[name] / MB:.0f}{_far(name, found, plan)}" for name in PARTS]
            peak = line["trained"]["peak"]
            off = plan["peak"] / peak - 1
            share = sum(found[name] for name in ("adapter", "gradients", "state")) / found["peak"]
            rows.append(
                [line["shape"], *cells, f"{peak / MB:.0f} / {plan['peak'] / MB:.0f} ({off:+.1%})", f"{share:.1%}"]
            )
    head = ["", *PARTS, "peak of halfbyte train", "adapter, gradients, state"]
    return markdown(head, rows) + (
        "\n\nMB (10⁶ bytes), measured / foretold. ‡: off by more than 10 % and 8 MiB. The loop is no whole run, so "
        "that its process is smaller than the plan's. Last column: share of the loop's peak."
    )


def _far(name: str, found: dict[str, int], plan: dict[str, int]) -> str:
    off = abs(plan[name] - found[name])
    return " ‡" if name in CLAIMED and off > max(PART_TOLERANCE * found[name], SLACK) else ""


def table_7b(lab: Book) -> str:
    """Return the paper's figures of 7B beside the plan's."""
    rows = []
    for line in lab.lines():
        if "plan of" in line:
            parts, way = line["parts"], "recomputed" if line["recompute"] else "kept"
            layers = parts["inputs"] if line["recompute"] else parts["kept"]
            paper = PAPER["inputs" if line["recompute"] else "kept"]
            rows.append([f"{line['tokens']}, {way}", f"{parts['base'] / MB:.0f} / {PAPER['base'] / MB:.0f}",
                         f"{parts['adapter'] / MB:.0f} / {PAPER['adapter'] / MB:.0f}",
                         f"{layers / MB:.0f} / {paper / MB:.0f}", f"{sum(parts.values()) / MB:.0f}"])  # fmt: skip
    head = ["tokens of a row, layers", "base", "adapter", "activations of layers", "peak"]
    return markdown(head, rows) + "\n\n7B, one row, rank 64 in fp32: MB of the plan / of the paper (FLAN v2, one row)."


def picture(lab: Book) -> Figure:
    """Draw the parts as bars, measured over foretold; a mark: the peak of ``halfbyte train``."""
    lines = [line for line in lab.lines() if "shape" in line]
    figure = Figure(figsize=(10, 1.1 + 0.85 * len(lines)), layout="constrained")
    axes = figure.subplots()
    places, labels = [], []
    for number, line in enumerate(lines):
        for way, off in (("measured", 0.0), ("planned", 0.38)):
            left, place = 0.0, -(number + off)
            for part, color in zip(PARTS, COLORS, strict=True):
                size = max(line[way][part], 0) / MB
                label = part if number == 0 and way == "measured" else None
                axes.barh(place, size, 0.34, left, color=color, label=label, alpha=0.6 if off else 1)
                left += size
            places.append(place)
            labels.append(line["shape"] if way == "measured" else "the plan")
        peak = line["trained"]["peak"] / MB
        label = "peak of halfbyte train" if number == 0 else None
        axes.plot([peak, peak], [-number - 0.58, -number + 0.2], "k:", label=label)
    axes.set_yticks(places, labels, fontsize=8)
    axes.set(xlabel="MB beyond what a process takes for its imports")
    axes.legend(ncols=4, fontsize=8, loc="upper center", bbox_to_anchor=(0.45, -0.14 - 0.25 / len(lines)))
    axes.grid(axis="x", alpha=0.3)
    return figure


def child(way: str, folder: str, shape: dict[str, Any]) -> None:
    """Measure in this process, and print what was found."""
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    ways = {"loop": loop, "train": train}
    print(json.dumps(ways[way](Path(folder), Shape(**shape))))


def main() -> None:
    """Measure, and write."""
    lab, small = book("memory", __doc__)
    measure(lab, (SMALL,) if small else SHAPES)
    lab.write("table.md", table(lab) + "\n\n" + table_7b(lab))
    picture(lab).savefig(lab.folder / "parts.png", dpi=DPI)


if __name__ == "__main__":
    with quiet():
        if "--child" in sys.argv:
            child(*json.loads(sys.argv[2]))
        else:
            main()
