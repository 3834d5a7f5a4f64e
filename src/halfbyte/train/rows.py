"""The rows of a run: its data as tokens, as it reads them, and as whoever comes after it reads them again."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from halfbyte import data
from halfbyte.errors import InputError
from halfbyte.hf.models.configs import ADAPTER
from halfbyte.hf.models.new_tokens import NewToken
from halfbyte.runs.config import TrainConfig
from halfbyte.runs.folder import RunFolder
from halfbyte.train.adapters import load_tokenizer
from halfbyte.train.methods import Method, method_of
from halfbyte.train.tasks import known_classes


def opened_tokenizer(config: TrainConfig, note: Callable[[str], None]) -> tuple[Any, list[NewToken]]:
    """Return the tokenizer of a run with all that its options give it, and the tokens that were added."""
    tokenizer, added = load_tokenizer(config)
    for line in data.equip(tokenizer, config):
        note(line)
    return tokenizer, added


def prepared(config: TrainConfig, method: Method, tokenizer: Any, progress: Any = None) -> data.Prepared:
    """Return the data of a run as rows of tokens."""
    return data.prepare(
        config,
        tokenizer,
        method=config.method,
        form=method.form,
        take=functools.partial(method.take, config.method),
        progress=progress,
        known_classes=known_classes(config),
    )


def rows_again(adapter: Path, files: list[str] | None = None, trust_remote_code: bool = False) -> data.Prepared:
    """Return the rows of a finished run, from its data or from other ``files``; those of an adapter from files alone.

    Args:
        adapter: its folder.
        files: other data.
        trust_remote_code: run code that comes with the tokenizer, also where the run does not say so.

    Raises:
        InputError: it is no run, and there are no files; or the data are gone or cannot be read.
    """
    folder = RunFolder(adapter)
    given: dict[str, Any] = {"output": adapter} | ({"trust_remote_code": True} if trust_remote_code else {})
    if files is not None:
        given |= {"data": files, "eval_data": None, "eval_share": None, "replay": None}
    if folder.config.is_file():
        config = TrainConfig.from_yaml(folder.config, given)
    elif files is not None:
        given |= {"output": adapter / "again"}  # never made
        config = TrainConfig.from_yaml(None, given | {"model": str(adapter), "adapter": adapter})
    else:
        raise InputError(f"{adapter} is no run of halfbyte, so its data are not known; name some (--data FILE).")
    tokenizer, _ = opened_tokenizer(config, lambda _: None)
    return prepared(config, method_of(config), tokenizer)


def some_texts(rows: data.Tokenized, tokens: int, seed: int, longest: int = 2048) -> list[Tensor]:
    """Return rows by chance, int64 ``[length]`` each, until they have so many ``tokens`` together.

    Args:
        rows: to choose from.
        tokens: of all; the last row is cut.
        seed: decides which.
        longest: what is behind so many tokens of a row is left out.
    """
    texts: list[Tensor] = []
    left = tokens
    for number in np.random.default_rng(seed).permutation(len(rows.rows)):
        ids = torch.as_tensor(rows.rows[int(number)]["input_ids"][: min(longest, left)], dtype=torch.int64)
        if len(ids):
            texts.append(ids)
            left -= len(ids)
        if left <= 0:
            break
    return texts


def has_rows(adapter: Path) -> bool:
    """Return whether an adapter is a run whose options say what it was trained on."""
    return (adapter / ADAPTER).is_file() and RunFolder(adapter).config.is_file()
