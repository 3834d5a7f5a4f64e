"""The folder that ``qlora.py`` leaves, and what it goes on from.

    checkpoint-N/adapter_model/    the adapter after N steps (:mod:`halfbyte.hf.trainers.qlora`)
    train_results.json, eval_results.json, predict_results.json, and all of them in all_results.json
    metrics.json                   the same with run_name
    trainer_state.json             the log
    predictions.jsonl              the held-out rows with prediction and prediction_with_input
    completed                      training is finished

Beside them stand config.yaml, run.json and metrics.jsonl of a run of ours (:mod:`halfbyte.runs.folder`).
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from halfbyte import checksums
from halfbyte.errors import InputError
from halfbyte.files import whole_file, write_text
from halfbyte.hf.trainers import distributed
from halfbyte.hf.trainers.qlora import ADAPTER, checkpoint_folder, checkpoints, link_adapter

RESULTS = ("train_results.json", "eval_results.json", "predict_results.json", "all_results.json")


class Outputs:
    """The files in the folder ``path``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.completed = path / "completed"
        self.metrics = path / "metrics.json"
        self.predictions = path / "predictions.jsonl"
        self.trainer_state = path / "trainer_state.json"

    def last_checkpoint(self, best: bool = False, tell: Callable[[str], None] = lambda _: None) -> Path | None:
        """Return the newest checkpoint, if there is one, as ``get_last_checkpoint`` does.

        One that holds a whole state comes before those with an adapter alone, over which a run may have begun. Where
        training is finished, it is the one that training ended with, or with ``best`` the best one. Of whole states
        that are damaged the one before is taken, which is told.

        Raises:
            InputError: all of them are.
        """
        if self.completed.exists() and (ended := self._ended_with(best)):
            return ended
        there = checkpoints(self.path)
        whole = [folder for folder in there if (folder / "state.json").is_file()]
        if not whole:
            return next(reversed(there), None)
        found, damaged = checksums.newest_good(whole)
        if found is None:
            raise InputError(checksums.none_is_good(self.path, damaged))
        for line in damaged:
            tell(f"Not to be gone on from: {line}; the checkpoint before it is taken")
        return found

    def _ended_with(self, best: bool) -> Path | None:
        try:
            state = json.loads(self.trainer_state.read_text(encoding="utf-8"))
            step = state["best_global_step"] if best and state["best_global_step"] else state["global_step"]
        except (OSError, ValueError, KeyError, TypeError):
            return None  # the script's own, or none
        folder = checkpoint_folder(self.path, step)
        return folder if (folder / ADAPTER).is_dir() else None

    def remove(self) -> None:
        """Remove what an earlier run has left."""
        for folder in checkpoints(self.path):
            shutil.rmtree(folder)
        for file in (self.completed, self.metrics, self.predictions, self.trainer_state):
            file.unlink(missing_ok=True)
        for name in RESULTS:
            (self.path / name).unlink(missing_ok=True)

    def finish_training(self, trainer: Any) -> None:
        """Save the adapter as training left it, unless its last step did so, and say that training is finished."""
        best = trainer.state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
        folder = Path(best) if best else trainer.state_folder(trainer.state.global_step)
        there = (folder / ADAPTER).is_dir()
        if not there:
            trainer.save_model(str(folder))
        with distributed.first_writes() as writes:
            if writes and not there:
                link_adapter(folder)
            if writes:
                write_text(self.completed, "")

    def write_metrics(self, metrics: dict[str, Any]) -> None:
        """Write ``metrics.json``."""
        write_text(self.metrics, json.dumps(metrics))

    def write_predictions(self, rows: list[dict[str, Any]]) -> None:
        """Write ``predictions.jsonl``."""
        with whole_file(self.predictions) as part, part.open("w", encoding="utf-8") as lines:
            lines.writelines(json.dumps(row) + "\n" for row in rows)


def adapter_options(checkpoint: Path) -> dict[str, Any]:
    """Return the options of the adapter in a checkpoint, by the flags' names.

    Raises:
        InputError: there is no LoRA adapter in it that can be read.
    """
    folder = checkpoint / ADAPTER
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        found = {f"lora_{name}": config[key] for name, key in (("r", "r"), ("alpha", "lora_alpha"))}
        found["lora_dropout"] = config["lora_dropout"]
        targets = config["target_modules"]
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{folder} holds no LoRA adapter (adapter_config.json); name another output_dir.") from error
    if not (folder / "adapter_model.safetensors").is_file():
        raise InputError(
            f"{folder} holds no adapter_model.safetensors. Pickled weights (adapter_model.bin) are not read: save it "
            "again with save_pretrained of a newer PEFT, or name another output_dir."
        )
    return found | {"lora_modules": targets if isinstance(targets, str) else ",".join(sorted(targets))}
