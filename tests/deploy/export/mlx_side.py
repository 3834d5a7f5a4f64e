"""Opens folders by mlx-lm alone, for the tests: their logits, or a greedy answer. A process of its own.

python mlx_side.py logits IDS.npy FOLDER ...      in fp32, of each row; to FOLDER.npy
python mlx_side.py answer IDS.npy FOLDER NEW      NEW tokens after the first row; to FOLDER.npy
python mlx_side.py convert FOLDER OUT BITS        as mlx_lm.convert does it; 16 bits are bf16
"""

import sys

import mlx.core as mx
import numpy as np
from mlx_lm import convert, load
from mlx_lm.generate import generate_step

how, first, *rest = sys.argv[1:]
if how == "convert":
    for out, bits in zip(rest[::2], map(int, rest[1::2]), strict=True):
        convert(first, out, quantize=bits < 16, q_bits=bits if bits < 16 else None, dtype="bfloat16")
for folder in rest[:1] if how == "answer" else rest if how == "logits" else []:
    model, _ = load(folder)
    model.set_dtype(mx.float32)  # scales and biases too: the same weights, computed exactly
    ids = mx.array(np.load(first))
    if how == "answer":
        steps = zip(generate_step(ids[0], model), range(int(rest[1])), strict=False)
        np.save(f"{folder}.npy", np.array([int(token) for (token, _), _ in steps]))
    else:
        np.save(f"{folder}.npy", np.array(model(ids).astype(mx.float32)))
