"""What a run is made from beside its options and its base model, as digests: content may change under the same name."""

import hashlib
import json
from typing import Any

from halfbyte import data, tables
from halfbyte.runs.config import TrainConfig


def digests(config: TrainConfig, tokenizer: Any, rows: data.Prepared) -> dict[str, str]:
    """Return digests (SHA-256) by the names of :data:`halfbyte.runs.folder.INPUTS`.

    Args:
        config: of the run.
        tokenizer: as it is trained with, new tokens and chat template included.
        rows: the tables of tokens; the column that says where a row comes from is no part of them.
    """
    words = [sorted(tokenizer.get_vocab().items()), tokenizer.chat_template, tokenizer.special_tokens_map]
    found = {"data": tables.digest(rows.train.rows)}
    if rows.evaluation:
        found["eval_data"] = tables.digest(rows.evaluation.rows)
    found["tokenizer"] = hashlib.sha256(json.dumps(words, default=str).encode()).hexdigest()
    if config.adapter:
        digest = hashlib.sha256()
        for file in sorted(config.adapter.glob("adapter_*")):
            digest.update(f"{file.name}\n".encode())
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        found["adapter"] = digest.hexdigest()
    return found
