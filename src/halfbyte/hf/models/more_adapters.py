"""Further adapters over one base, each by a name of the user's, to run side by side."""

import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from peft import PeftModel
from transformers import PreTrainedModel

from halfbyte.errors import InputError
from halfbyte.files import model_path
from halfbyte.hf.layers.prepare import prepare
from halfbyte.hf.models.adapter_files import put_adapter
from halfbyte.hf.models.base_files import check_base
from halfbyte.hf.models.configs import ADAPTER, json_of
from halfbyte.hf.models.hub import locate
from halfbyte.nn import FrozenLinear

NAME = re.compile(r"\w[\w-]*")
TAKEN = ("none", "base")
"""What stands for no adapter."""


class Named(NamedTuple):
    """An adapter that was put on a model.

    Attributes:
        model: with the adapter; the same object where it had adapters by then.
        remark: a sentence on what is strange about it, or None.
    """

    model: PeftModel
    remark: str | None


def add_adapter(model: PreTrainedModel | PeftModel, path: str | Path, name: str) -> Named:
    """Put one more adapter on an opened model.

    Args:
        model: with adapters of the same kind by now, or none; its active adapter stays what it is.
        path: an adapter's folder (a run's is one), or a hub id.
        name: what it is called; letters, digits, ``_`` and ``-``.

    Raises:
        InputError: it is no adapter, or does not fit the model, or the name cannot be used; the model is as it was.
    """
    if not NAME.fullmatch(name) or name in TAKEN:
        raise InputError(
            f"An adapter cannot be called {name!r}; take letters, digits, _ and -, and neither none nor base."
        )
    configs = model.peft_config if isinstance(model, PeftModel) else {}
    if name in configs:
        raise InputError(f"There is an adapter called {name!r} already; take another name.")
    parts = {part for key, _ in model.named_parameters() for part in key.split(".")}
    if any(part.startswith(name) for part in (*parts, "lora_A", "lora_B", "weight", "bias")):
        # PEFT (0.21) finds an adapter's tensors by its name within theirs
        raise InputError(f"An adapter cannot be called {name!r}, since parts of the model are; take another name.")
    folder = Path(locate(path).path)
    if not (folder / ADAPTER).is_file():
        raise InputError(f"{path} is no adapter: it has no {ADAPTER}; give the folder of a run or of a PEFT adapter.")
    adapted = put_adapter(model, folder, name=name)
    if any(isinstance(module, FrozenLinear) for module in adapted.modules()):
        prepare(adapted)
    return Named(adapted, _remark(adapted, folder, name))


def _remark(model: PeftModel, folder: Path, name: str) -> str | None:
    """Return a sentence where the adapter names a base that is not known to be this one."""
    if check_base(folder, getattr(model.get_base_model(), "opened_from", None)):
        return None
    theirs: Any = json_of(folder / ADAPTER).get("base_model_name_or_path")
    ours = str(model.get_base_model().name_or_path)
    if not theirs or os.path.realpath(model_path(str(theirs))) == os.path.realpath(model_path(ours)):
        return None
    return f"The adapter {name} was trained on {theirs}, and this is {ours}; it fits, but may not do well."
