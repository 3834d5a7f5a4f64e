"""Whether an adapter that is trained on is over its own base model.

Weights are compared when the adapter is put on, where it has a fingerprint of its base
(:mod:`halfbyte.hf.models.base_files`). Names tell little: a model is called by a hub id and lies in a folder, or in a
copy that is quantized. Shapes tell little too: an adapter of Llama fits a Qwen of its size. So the two configurations
are compared, where the adapter's base can be found; where that leaves a doubt, it is said.
"""

import json
import re
import warnings
from pathlib import Path
from typing import Any

from halfbyte.errors import InputError
from halfbyte.hf.models.base_format import base_format
from halfbyte.runs.circumstances import fingerprint, folder_of
from halfbyte.runs.config import TrainConfig

MAY_DIFFER = re.compile(
    r"_name_or_path|architectures|(torch_)?dtype|quantization_config|transformers_version|use_cache|.*_token_id"
    r"|max_position_embeddings|rope_.*|sliding_window|.*dropout.*|.*attn.*implementation|id2label|label2id|num_labels"
    r"|problem_type"
)
"""Keys of ``config.json`` by which copies of one model may differ: how they lie, and what users set."""
RUN = "run.json"


def check_base(config: TrainConfig, folder: Path, named: str | None, is_known: bool) -> None:
    """Hold the base model of a run to be that of the adapter in ``folder``; warn where it may be another one.

    Args:
        config: of the run.
        folder: of the adapter.
        named: its base model, as ``adapter_config.json`` has it.
        is_known: whether their fingerprints (:mod:`halfbyte.hf.models.fingerprint`) say that the weights are the same.

    Raises:
        InputError: it is a model of another kind or size.
    """
    _check_format(config, folder)
    if not named or named == config.model or folder_of(named).resolve() == folder_of(config.model).resolve():
        return
    theirs, ours = _about(named), _about(config.model)
    keys = ["model_type", *sorted(theirs.keys() | ours.keys())] if theirs and ours else []
    other = [key for key in keys if theirs.get(key) != ours.get(key)]
    if other:
        key = other[0]
        raise InputError(
            f"The adapter {folder} is not one of {config.model}: it was trained over {named}, whose {key} is "
            f"{theirs.get(key)!r} and not {ours.get(key)!r}; name that model."
        )
    if not is_known and _fingerprint(folder) != fingerprint(config.model):
        warnings.warn(
            f"The adapter {folder} was trained over {named}, and this run trains it on over {config.model}; over other "
            "weights than a copy's it says nothing.",
            stacklevel=2,
        )


def _check_format(config: TrainConfig, folder: Path) -> None:
    """Warn where the base was held in another number format than now."""
    found = base_format(folder)
    if found is None and not (folder / RUN).is_file():
        return  # whose it is, is not known
    before = found.quant_type if found else TrainConfig.model_fields["quant_type"].default
    if before != config.quant_type:
        warnings.warn(
            f"The adapter {folder} was trained over a base in quant_type {before}, and this run holds it in "
            f"{config.quant_type}.",
            stacklevel=2,
        )


def _about(model: str) -> dict[str, Any]:
    """Return what makes a model another one, of its ``config.json`` if that is there."""
    try:
        found = json.loads((folder_of(model) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {key: value for key, value in found.items() if not MAY_DIFFER.fullmatch(key)}


def _fingerprint(folder: Path) -> str | None:
    """Return that of the base model with which the run in ``folder`` began, if it is one."""
    try:
        found: str | None = json.loads((folder / RUN).read_text(encoding="utf-8"))["circumstances"]["base_model"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found
