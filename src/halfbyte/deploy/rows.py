"""Token rows to calibrate with: those that a run was trained on, or those of a file.

Read and rendered as for training (:mod:`halfbyte.data`), from the cache where they still are, with the tokenizer and
chat template that lie with the model; nothing is trained. What was held out for evaluation is left alone.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from halfbyte import data
from halfbyte.data.forms import sides
from halfbyte.data.options import DataOptions
from halfbyte.errors import InputError
from halfbyte.runs.config import TrainConfig
from halfbyte.runs.folder import RunFolder
from halfbyte.runs.history import is_run
from halfbyte.train.methods import method_of

Progress = Callable[[int, int], None]


def rows_of_run(run: Path, tokenizer: Any, progress: Progress | None = None) -> Iterator[np.ndarray]:
    """Yield the token ids of the rows that a run was trained on, int32 ``[length]``, in an order of their own.

    Args:
        run: the run's folder.
        tokenizer: as it lies there.
        progress: called with the bytes read and the bytes in all.

    Raises:
        InputError: it is no run's folder, its task is not ``lm``, or its data is not there any more.
    """
    if not is_run(run):
        raise InputError(f"{run} is no run's folder, so it is not known what it was trained on; name rows with --data.")
    # what the tokenizer was given is saved with it
    config = TrainConfig.from_yaml(RunFolder(run).config, {"chat_template": None, "thinking": None})
    if config.task != "lm":
        raise InputError(f"{run} was trained to {config.task}; only language models are calibrated.")
    method = method_of(config)
    take = functools.partial(method.take, config.method)
    return _rows(config, tokenizer, progress, method=config.method, form=method.form, take=take)


def rows_of_file(file: str, model: str, tokenizer: Any, progress: Progress | None = None) -> Iterator[np.ndarray]:
    """Yield the token ids of the rows of some data, int32 ``[length]``, in an order of their own.

    Args:
        file: the data, named as for training.
        model: whose data it is.
        tokenizer: of the model.
        progress: as in :func:`rows_of_run`.

    Raises:
        InputError: the data is not there, or cannot be read.
    """
    return _rows(DataOptions(model=model, data=file), tokenizer, progress)  # type: ignore[arg-type]  # a validator reads it


def _rows(options: DataOptions, tokenizer: Any, progress: Progress | None, **method: Any) -> Iterator[np.ndarray]:
    report = (lambda _, done, size: progress(done, size)) if progress else None
    table = data.prepare(options, tokenizer, progress=report, **method).train.rows
    return (
        np.asarray(ids, np.int32)
        for number in np.random.default_rng(options.seed).permutation(len(table)).tolist()
        for ids, _ in sides(table[number])
    )


def blocks(rows: Iterable[np.ndarray], length: int, count: int) -> np.ndarray:
    """Lay rows one behind the other and cut them into equal lengths, as GPTQ's and AWQ's authors do.

    Args:
        rows: token ids.
        length: of a block.
        count: of blocks, at most.

    Returns:
        int32 ``[blocks, length]``; of rows that do not fill one block, one that is shorter.
    """
    taken: list[np.ndarray] = []
    tokens = 0
    for row in rows:
        taken.append(row)
        tokens += len(row)
        if tokens >= length * count:
            break
    if not tokens:
        return np.zeros((0, length), np.int32)
    flat = np.concatenate(taken)[: length * count]
    return flat[None] if tokens < length else flat[: len(flat) // length * length].reshape(-1, length)
