"""The paper's script in several processes: what has to be alike in them, and what they go on with after a restart."""

import dataclasses
from pathlib import Path

from halfbyte.hf.trainers import distributed
from halfbyte.runs import launched
from halfbyte.runs.config import TrainConfig
from halfbyte.runs.folder import RunFolder
from halfbyte.train import worlds
from halfbyte.train.qlora.flags import Flags
from halfbyte.train.qlora.translate import OPTIONS, Translated


def settle(translated: Translated, folder: RunFolder) -> Translated:
    """Return the run as it is where a launcher started the processes again: to go on with what this job began."""
    if not launched.restarts():
        return translated
    [ours] = distributed.gather(folder.begun and folder.job() == launched.job())[:1]
    flags = translated.flags.but(overwrite_output_dir=False) if ours else translated.flags
    return dataclasses.replace(translated, flags=flags)


def check_start(flags: Flags, config: TrainConfig, folder: RunFolder, checkpoint: Path | None) -> None:
    """Look whether all processes have the same versions and flags, and see one folder.

    Raises:
        InputError: they do not.
    """
    own = {flag for flag, option in OPTIONS.items() if option in worlds.OWN}
    told = {f"--{name}": str(value) for name, value in flags.items() if name not in own | {"run_name"}}
    distributed.check_alike(told, "give all of them the same")
    worlds.check_start(config, folder, checkpoint)
