"""Qwen3-30B-A3B's shape beside a dense model of the same active weights: training, and decoding.

    python benchmarks/mixture.py FOLDER train                 steps of 4 × 512 tokens, rank 16, each model in turn
    python benchmarks/mixture.py FOLDER train --memory 8GiB   the mixture alone, its base paged
    python benchmarks/mixture.py FOLDER decode                tokens one after the other, and in 16 conversations

The models have random weights in 4 bits (NF4, double quantization) and are written to FOLDER (15.3 and 2.2 GiB), where
they stay. The dense one is the same but for its MLPs, each as wide as the 8 experts that a token takes. Training is
``halfbyte train``'s own way in a process of its own, as in plan.py, which says what is measured.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import plan

MIXTURE, DENSE = "qwen3-30b-a3b", "qwen3-as-a3b"
PROMPT, TOKENS, ROUNDS = 128, 24, 5


def train(folder: Path, models: list[str], tokens: tuple[int, int], more: dict[str, Any]) -> None:
    for model in models:
        with tempfile.TemporaryDirectory(prefix="halfbyte-mixture-") as place:
            options = plan.options_of(folder / model, Path(place), (model, tokens[1], tokens[0], 16, more))
            options["max_steps"] = plan.WARM_UP + 2
            found = plan.measure(options)
        seconds = statistics.median(found["wall"][plan.WARM_UP :])
        print(json.dumps({"model": model, **more, "tokens_per_second": tokens[0] * tokens[1] / seconds, **found}))


def decode(folder: Path, models: list[str]) -> None:
    import torch

    from halfbyte import load
    from halfbyte.bench.decode import CALLS, READ_BYTES, _fastest
    from halfbyte.bench.decode_sides import weight_bytes
    from halfbyte.generate.decoders import decoder_for
    from halfbyte.quiet import quiet

    memory = torch.ones(READ_BYTES // 4)
    opened = {}
    with quiet():
        for model in models:
            opened[model] = decoder_for(load(folder / model).eval())
    ids = torch.randint(1, 250, (16, PROMPT), generator=torch.Generator().manual_seed(0)).tolist()
    for model, decoder in opened.items():
        print(json.dumps({"model": model, "native": decoder.reason is None}))
    for rows in (1, 16):
        begun: dict[str, Any] = {}
        for model, decoder in opened.items():
            begun[model] = []
            started = time.perf_counter()
            for row in ids[:rows]:
                sequence = decoder.begin(row, None)
                decoder.read(sequence, row[sequence.length :])
                begun[model].append(sequence)
            taken = time.perf_counter() - started
            print(json.dumps({"model": model, "prompt_tokens_per_second": rows * PROMPT / taken}))
        for _ in range(ROUNDS):
            bandwidth = READ_BYTES / _fastest(memory.sum, CALLS)
            for model, decoder in opened.items():
                started = time.perf_counter()
                for token in range(TOKENS):
                    decoder.step(begun[model], [2 + (token * 7 + 3 * row) % 200 for row in range(rows)])
                seconds = (time.perf_counter() - started) / TOKENS
                active = active_bytes(decoder.reading.parts, weight_bytes)
                print(
                    json.dumps(
                        {
                            "model": model, "rows": rows, "tokens_per_second": rows / seconds,
                            "active_bytes": active, "bandwidth": bandwidth,
                            "of_floor": active / bandwidth / seconds if rows == 1 else None,
                        }
                    ),
                    flush=True,
                )  # fmt: skip


def active_bytes(parts: Any, weight_bytes: Any) -> int:
    """Return the bytes of the weights that one token reads, each once."""

    def of(products: Any) -> int:
        return sum(weight_bytes(weight) for weight in products.weights)

    total = of(parts.head)
    for layer in parts.layers:
        total += of(layer.qkv) + of(layer.o)
        mlps = [layer.mlp]
        if layer.mixture is not None:
            total += of(layer.mixture.router)
            mlps = layer.mixture.experts[: layer.mixture.chosen]
        total += sum(of(mlp.gate_up) + of(mlp.down) for mlp in mlps)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("what", choices=("train", "decode"))
    parser.add_argument("--memory")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", choices=(MIXTURE, DENSE))
    given = parser.parse_args()
    models = [given.only] if given.only else [MIXTURE, DENSE]
    for model in models:
        if not (given.folder / model / "config.json").is_file():
            plan.write_packed(model, given.folder / model)
    if given.what == "decode":
        decode(given.folder, models)
    elif given.memory:
        train(given.folder, [MIXTURE], (given.rows, given.length), {"memory": given.memory})
    else:
        for _ in range(given.rounds):
            train(given.folder, models, (given.rows, given.length), {})


if __name__ == "__main__":
    main()
