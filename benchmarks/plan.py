"""The planner held to runs: memory and time of a step, foretold and measured, over twenty configurations.

    python benchmarks/plan.py OUT                   measure what OUT lacks, then print the table
    python benchmarks/plan.py OUT --only 135m       those whose name has this in it
    python benchmarks/plan.py OUT --table           the table of what OUT has

A configuration is a random model in 4 bits, rows that are all of one length, and ``halfbyte train``'s own way in a
process of its own. Before it the same options are planned. Each adds a line to ``OUT/plan.jsonl``; what is there is not
done again. Measured is

    peak    the highest anonymous memory of the process (RssAnon, read every 10 ms) less what it was after the imports,
            and the pages of the base's files that are in memory at the last step (Rss in /proc/<pid>/smaps); of these
            folders, which have no fingerprint of their own, a first run reads everything, embeddings too
    step    the median time of the steps behind the first: what passed, where nothing else ran beside; else the
            processor time of the process over its threads, which is what would have passed
"""

import argparse
import itertools
import json
import os
import re
import select
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

WARM_UP, STEPS, LARGE_STEPS = 1, 2, 1
SAMPLING = 0.01
CROWDED = 1.15
"""A step that takes so many times its processor time over its threads had company."""
WORDS = "the small river runs over old stones while two birds sing and nobody writes "

LLAMA: dict[str, Any] = {"kind": "LlamaConfig", "tie_word_embeddings": True}
QWEN3: dict[str, Any] = {
    "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
    "vocab_size": 151_936, "tie_word_embeddings": False,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "llama-135m": LLAMA
    | {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
       "num_key_value_heads": 3, "vocab_size": 49_152},
    "llama-1b": LLAMA
    | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
       "num_key_value_heads": 8, "vocab_size": 128_256},
    "qwen2-0.5b": {
        "kind": "Qwen2Config", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151_936, "tie_word_embeddings": True,
    },
    "qwen3-0.6b": {
        "kind": "Qwen3Config", "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_936,
        "tie_word_embeddings": True,
    },
    "gemma3-270m": {
        "kind": "Gemma3TextConfig", "hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18,
        "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 262_144,
        "sliding_window": 512, "tie_word_embeddings": True,
    },
    "olmo2-1b": {
        "kind": "Olmo2Config", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 100_352, "tie_word_embeddings": False,
    },
    "phi3-3.8b": {
        "kind": "Phi3Config", "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32_064, "tie_word_embeddings": False,
        "resid_pdrop": 0.0,
    },
    "qwen3-30b-a3b": QWEN3
    | {"kind": "Qwen3MoeConfig", "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
       "intermediate_size": 6144, "norm_topk_prob": True},
    "qwen3-as-a3b": QWEN3 | {"kind": "Qwen3Config", "intermediate_size": 8 * 768},
    "mistral-7b": {
        "kind": "MistralConfig", "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32_000, "sliding_window": None,
        "tie_word_embeddings": False,
    },
}  # fmt: skip

# model, tokens of a row, rows of a pass, rank, and other options
CONFIGURATIONS: tuple[tuple[str, int, int, int, dict[str, Any]], ...] = (
    ("llama-135m", 128, 4, 16, {}),
    ("llama-135m", 512, 4, 16, {}),
    ("llama-135m", 512, 4, 64, {"lora_dropout": 0.1}),
    ("llama-135m", 2048, 1, 8, {}),
    ("llama-135m", 2048, 2, 16, {"memory": "1GiB"}),
    ("llama-135m", 8192, 1, 16, {}),
    ("llama-135m", 512, 16, 16, {}),
    ("qwen2-0.5b", 256, 2, 16, {}),
    ("qwen2-0.5b", 512, 4, 64, {}),
    ("qwen3-0.6b", 512, 2, 16, {}),
    ("qwen3-0.6b", 1024, 2, 32, {"memory": "2GiB"}),
    ("gemma3-270m", 512, 4, 16, {}),
    ("gemma3-270m", 4096, 1, 16, {}),
    ("olmo2-1b", 256, 2, 16, {}),
    ("llama-1b", 128, 4, 16, {}),
    ("llama-1b", 512, 2, 16, {}),
    ("llama-1b", 2048, 1, 64, {"memory": "2GiB"}),
    ("phi3-3.8b", 128, 2, 16, {}),
    ("mistral-7b", 128, 1, 16, {}),
    ("mistral-7b", 512, 1, 64, {}),
)


def name_of(model: str, length: int, batch: int, rank: int, more: dict[str, Any]) -> str:
    words = [model, f"{batch}x{length}", f"rank {rank}", *(f"{key} {value}" for key, value in more.items())]
    return ", ".join(words)


def configuration(model: str) -> Any:
    import transformers

    from halfbyte.bench.shapes import byte_tokenizer

    options = dict(MODELS[model])
    tokenizer = byte_tokenizer()
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    kind = getattr(transformers, options.pop("kind"))
    return kind(**options, **ends, max_position_embeddings=131_072)


def write_packed(model: str, folder: Path) -> None:
    """Write a model with random values in 4 bits, a file a layer; layers have the same values, experts of one too."""
    import torch
    from safetensors.torch import save_file
    from torch import nn
    from transformers import AutoModelForCausalLM

    from halfbyte import hf
    from halfbyte.bench.shapes import byte_tokenizer
    from halfbyte.hf.layers.stacks import take_apart
    from halfbyte.quant import quantize_4bit

    config = configuration(model)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    take_apart(skeleton)
    folder.mkdir(parents=True, exist_ok=True)
    byte_tokenizer().save_pretrained(folder)
    head, made, index, size = skeleton.get_output_embeddings(), {}, {}, 0
    files: dict[str, dict[str, torch.Tensor]] = {}
    linears = {f"{n}.weight" for n, m in skeleton.named_modules() if isinstance(m, nn.Linear) and m is not head}
    for name, parameter in skeleton.named_parameters():
        number = re.search(r"layers\.(\d+)\.", name)
        file = f"model-{number[1] if number else 'rest'}.safetensors"
        alike = re.sub(r"(layers|experts)\.\d+\.", "", name)
        if alike not in made:
            values = torch.randn(parameter.shape, dtype=torch.float32) * 0.02
            if parameter.ndim == 1:
                values = torch.ones(parameter.shape)
            made[alike] = quantize_4bit(values) if name in linears else values.to(torch.bfloat16)
        found = made[alike]
        tensors = {name: found} if isinstance(found, torch.Tensor) else found.state_dict(name)
        files.setdefault(file, {}).update(tensors)
    for file, tensors in files.items():
        save_file({key: tensor.clone() for key, tensor in tensors.items()}, folder / file, {"format": "pt"})
        index.update(dict.fromkeys(tensors, file))
        size += sum(tensor.nbytes for tensor in tensors.values())
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": size}, "weight_map": index})
    )
    written = config.to_dict() | {
        "architectures": [type(skeleton).__name__],
        "dtype": "bfloat16",
        "quantization_config": hf.HalfbyteConfig(compute_dtype="bfloat16").to_dict()
        | {"quant_method": "bitsandbytes", "load_in_4bit": True, "_load_in_4bit": True, "load_in_8bit": False}
        | {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "bfloat16"},
    }
    (folder / "config.json").write_text(json.dumps(written, default=str))


def options_of(folder: Path, place: Path, entry: tuple[str, int, int, int, dict[str, Any]]) -> dict[str, Any]:
    _, length, batch, rank, more = entry
    steps = WARM_UP + (LARGE_STEPS if re.search(r"-[3-9](\.\d)?b$", entry[0]) else STEPS)
    rows = [json.dumps({"text": (WORDS * (1 + length // 40))[i : i + 2 * length + 8]}) for i in range(batch * steps)]
    (place / "rows.jsonl").write_text("\n".join(rows) + "\n")
    return {
        "model": str(folder), "data": str(place / "rows.jsonl"), "output": str(place / "run"), "rank": rank,
        "lora_alpha": 2 * rank, "lora_dropout": 0.0, "max_steps": steps, "batch_size": batch,
        "gradient_accumulation_steps": 1, "max_length": length, "save_steps": steps + 1, "sample_prompts": [],
        "overwrite": True, **more,
    }  # fmt: skip


def anonymous(pid: int) -> int:
    try:
        found = re.search(r"^RssAnon:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return 1024 * int(found[1]) if found else 0


def resident_base() -> int:
    """The bytes of mapped safetensors that are in memory."""
    inside, pages = False, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"^[0-9a-f]+-[0-9a-f]+ ", line):
            inside = line.endswith(".safetensors")
        elif inside and line.startswith("Rss:"):
            pages += 1024 * int(line.split()[1])
    return pages


def child(options: dict[str, Any]) -> None:
    """Train, and say on standard output what happens, a JSON a line."""
    import warnings

    warnings.simplefilter("ignore")
    from halfbyte.quiet import quiet

    with quiet():
        from halfbyte.kernels import pool
        from halfbyte.runs.events import Begin, Note, StepMetrics
        from halfbyte.train import TrainConfig, fine_tune

        def say(**what: Any) -> None:
            print(json.dumps(what), flush=True)

        say(imported=os.getpid())
        sys.stdin.readline()
        wall, own = [], []

        def listen(event: Any) -> None:
            if isinstance(event, Begin | StepMetrics):
                wall.append(time.perf_counter())
                own.append(time.process_time())
                say(**{f"after_{len(wall) - 1}": anonymous(os.getpid()), "pool": vars(pool._pool)["most"]})
                if len(wall) == options["max_steps"] + 1:
                    times = [[b - a for a, b in itertools.pairwise(ends)] for ends in (wall, own)]
                    say(seconds=times[0], processor=times[1], resident=resident_base())
            elif isinstance(event, Note) and "ctivations" in event.text:
                say(policy=event.text)

        fine_tune(TrainConfig(**options), listen)


def measure(options: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", json.dumps(options)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout and process.stdin
    peak = imports = 0
    found: dict[str, Any] = {}
    text, is_open = b"", True
    while is_open:
        if select.select([process.stdout], [], [], SAMPLING)[0]:
            piece = os.read(process.stdout.fileno(), 2**16)
            is_open = bool(piece)
            *lines, text = (text + piece).split(b"\n")
            for said in (json.loads(line) for line in lines if line.startswith(b"{")):
                found |= said
                if "imported" in said:
                    imports = anonymous(process.pid)
                    process.stdin.write(b"\n")
                    process.stdin.flush()
        if imports:
            peak = max(peak, anonymous(process.pid))
    process.wait()
    if process.returncode or "seconds" not in found:
        raise SystemExit(f"the run ended with {process.returncode}")
    return {
        "anonymous": peak - imports,
        "resident": found["resident"],
        "peak": peak - imports + found["resident"],
        "processor": found["processor"],
        "wall": found["seconds"],
        "after": {name: found[name] - imports for name in found if name.startswith("after_")},
        "pool": found["pool"],
        "policy": found.get("policy", ""),
    }


def planned(options: dict[str, Any]) -> dict[str, Any]:
    """What the planner says, in this process: it loads no weight."""
    from halfbyte.plan.estimate import plan_run
    from halfbyte.runs.config import TrainConfig

    plan = plan_run(TrainConfig(**options), length=options["max_length"])
    return {
        "peak": plan.memory.peak, "step": plan.step.seconds, "parts": plan.memory.parts(), "times": vars(plan.step),
        "policy": str(plan.policy), "measured_rates": plan.machine.measured,
        "threads": plan.machine.threads,
    }  # fmt: skip


def step_of(line: dict[str, Any]) -> float:
    """What a step takes by itself: the time that passed, or beside other work processor time over threads."""
    wall, processor = (statistics.median(line["measured"][way][WARM_UP:]) for way in ("wall", "processor"))
    threads, alone = line["planned"]["threads"], line["planned"]["times"]["python"]
    shared = (processor - alone) / threads + alone  # Python runs in one thread
    return wall if wall < CROWDED * shared else shared


def table(lines: list[dict[str, Any]]) -> str:
    out = ["| configuration | peak, foretold | measured | off | step, foretold | measured | off | layers again |"]
    out.append("|---" * 8 + "|")
    off: dict[str, list[float]] = {"peak": [], "step": []}
    for line in lines:
        cells = [line["name"] + (" *" if line.get("note") else "")]
        for what, unit in (("peak", 2**30), ("step", 1)):
            foretold = line["planned"][what]
            fact = line["measured"]["peak"] if what == "peak" else step_of(line)
            off[what].append(foretold / fact - 1)
            cells += [f"{foretold / unit:.3g}", f"{fact / unit:.3g}", f"{foretold / fact - 1:+.1%}"]
        again = re.search(r"of (\d+) of (\d+) layers are recomputed", line["measured"]["policy"])
        out.append("| " + " | ".join([*cells, f"{again[1]} of {again[2]}" if again else "none"]) + " |")
    if lines:
        worst = {what: max(map(abs, values)) for what, values in off.items()}
        middle = {what: statistics.median(map(abs, values)) for what, values in off.items()}
        out.append(
            f"\nPeaks in GiB, steps in seconds. Off by {middle['peak']:.1%} and {middle['step']:.1%} in the middle, by "
            f"{worst['peak']:.1%} and {worst['step']:.1%} at most."
        )
    return "\n".join(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--only", default="")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--replan", action="store_true", help="foretell what was measured again, with today's formulas")
    parser.add_argument("--models", type=Path, help="where models are written, and stay; else they are removed")
    parser.add_argument("--child")
    given = parser.parse_args()
    if given.child:
        child(json.loads(given.child))
        return
    file = given.out / "plan.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    if not given.table:
        given.out.mkdir(parents=True, exist_ok=True)
        done = {line["name"] for line in lines}
        with tempfile.TemporaryDirectory(prefix="halfbyte-plan-") as temporary:
            models = given.models or Path(temporary)
            for entry in CONFIGURATIONS:
                name = name_of(*entry)
                if given.only not in name or (name in done) is not given.replan:
                    continue
                folder = models / entry[0]
                if not (folder / "config.json").is_file():
                    write_packed(entry[0], folder)
                place = Path(temporary)
                options = options_of(folder, place, entry)
                foretold = planned(options)
                if given.replan:
                    line = next(line for line in lines if line["name"] == name)
                    line["planned"] = foretold
                    continue
                load = os.getloadavg()[0]
                lines.append({"name": name, "planned": foretold, "measured": measure(options), "load_before": load})
                with file.open("a") as stream:
                    stream.write(json.dumps(lines[-1]) + "\n")
                print(name, foretold["peak"] / 2**30, lines[-1]["measured"], flush=True)
        if given.replan:
            file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    order = [name_of(*entry) for entry in CONFIGURATIONS]
    print(table(sorted((line for line in lines if line["name"] in order), key=lambda line: order.index(line["name"]))))


if __name__ == "__main__":
    main()
