"""Opens a folder by mlx-lm alone, for the tests: its logits, or its greedy answer. A process of its own.

    python mlx_side.py FOLDER IDS.npy OUT.npy [NEW]      logits in fp32 of each row; or NEW tokens after the first row
"""

import sys

import mlx.core as mx
import numpy as np
from mlx_lm import load
from mlx_lm.generate import generate_step

folder, ids, out, *rest = sys.argv[1:]
model, tokenizer = load(folder)
model.set_dtype(mx.float32)  # scales and biases too: the same weights, computed exactly
rows = mx.array(np.load(ids))
if rest:
    steps = zip(generate_step(rows[0], model), range(int(rest[0])), strict=False)
    found = np.array([int(token) for (token, _), _ in steps])
else:
    found = np.array(model(rows).astype(mx.float32))
np.save(out, found)
