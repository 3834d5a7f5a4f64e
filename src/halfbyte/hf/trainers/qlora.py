"""Our SFT trainer with the folders of ``qlora.py``: ``checkpoint-N`` with the adapter in ``adapter_model``.

    checkpoint-120/adapter_model/         the adapter, a PEFT folder
    checkpoint-120/adapter_model.safetensors, adapter_config.json, the tokenizer, state.json, ...
                                          the state that a run goes on from (:mod:`halfbyte.hf.trainers.state`)

The files of the adapter are links to those beside them, so they take no room twice.
"""

import os
import re
import shutil
from pathlib import Path
from typing import Any

from halfbyte.hf.trainers.methods import SFTTrainer

ADAPTER = "adapter_model"
FILES = ("adapter_model.safetensors", "adapter_config.json")


def checkpoint_folder(output: Path, step: int) -> Path:
    """Return the folder of the checkpoint after ``step`` steps."""
    return output / f"checkpoint-{step}"


def checkpoints(output: Path) -> list[Path]:
    """Return the checkpoints in ``output``, oldest first."""
    found = {
        int(name[1]): folder
        for folder in output.glob("checkpoint-*")
        if (name := re.fullmatch(r"checkpoint-(\d+)", folder.name)) and folder.is_dir()
    }
    return [found[step] for step in sorted(found)]


class QloraTrainer(SFTTrainer):
    """:class:`halfbyte.hf.trainers.SFTTrainer` that saves as the script does."""

    def state_folder(self, step: int) -> Path:
        """The folder of the checkpoint after ``step`` steps."""
        return checkpoint_folder(Path(self.args.output_dir), step)

    def _saved_states(self) -> list[Path]:
        return checkpoints(Path(self.args.output_dir))

    def _write_checkpoint(self, part: Path, *args: Any) -> None:
        super()._write_checkpoint(part, *args)
        link_adapter(part)


def link_adapter(checkpoint: Path) -> None:
    """Make ``adapter_model`` in a checkpoint of the files of the adapter that lie in it, with those about its base."""
    (checkpoint / ADAPTER).mkdir()
    for name in (*FILES, *(file.name for file in checkpoint.glob("base_*.json"))):
        try:
            os.link(checkpoint / name, checkpoint / ADAPTER / name)
        except OSError:  # a file system without links
            shutil.copyfile(checkpoint / name, checkpoint / ADAPTER / name)
