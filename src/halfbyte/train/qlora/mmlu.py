"""MMLU as ``qlora.py`` measures it in training (``MMLUEvalCallback``): see :mod:`halfbyte.evaluate.mmlu`.

The questions are those of its repository's ``data/mmlu``, or of the hub where there is no such file.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, TrainerCallback

from halfbyte.errors import InputError
from halfbyte.evaluate import mmlu
from halfbyte.evaluate.mmlu import Question
from halfbyte.runs.events import Evaluation, Listener
from halfbyte.train.qlora.data import Placed, tokenize
from halfbyte.train.qlora.flags import Flags
from halfbyte.train.qlora.translate import MMLU, SPLITS

FOLDER = Path("data/mmlu")


def read_questions(flags: Flags, folder: Path = FOLDER) -> list[Question]:
    """Return the questions that the flags name.

    Raises:
        InputError: there is no file and no hub, or the file is none of questions.
    """
    shots, split = MMLU[flags["mmlu_dataset"]], SPLITS[flags["mmlu_split"]]
    path = (folder / f"{shots}_{split}.json").absolute()
    questions = mmlu.prompts_in(path) if path.is_file() else _on_hub(shots, split, path)
    return questions[: flags["max_mmlu_samples"]]


def _on_hub(shots: str, split: str, path: Path) -> list[Question]:
    try:
        return mmlu.questions_on_hub("validation" if split == "val" else split, with_shots=shots.startswith("five"))
    except InputError as error:
        raise InputError(
            f"--do_mmlu_eval needs {path.name} in {path.parent}, as it lies in the script's repository (clone "
            f"https://github.com/artidoro/qlora and run there), or the hub: {error}"
        ) from error


class MmluCallback(TrainerCallback):  # type: ignore[misc]
    """Measures the questions whenever the trainer evaluates, and logs what came of it as the script does."""

    def __init__(
        self,
        trainer: Any,
        questions: Sequence[Question],
        tokenizer: PreTrainedTokenizerBase,
        flags: Flags,
        tell: Listener,
    ) -> None:
        self.trainer = trainer
        self.tell = tell
        self.tokenizer = tokenizer
        self.split = flags["mmlu_split"]
        self.batch_size = flags["per_device_eval_batch_size"]
        self.subjects = [question["subject"] for question in questions]
        placed = [Placed("", {name: question[name] for name in ("input", "output")}) for question in questions]
        cut = flags.but(source_max_len=flags["mmlu_source_max_len"], train_on_source=False)
        self.rows = [encoded.rows[0] for encoded in tokenize(placed, tokenizer, cut)]

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        results = self.measure()
        self.trainer.log(dict(results))
        accuracy = results[f"mmlu_{self.split}_accuracy"]
        self.tell(
            Evaluation(step=state.global_step, figures={"mmlu_loss": results["mmlu_loss"], "mmlu_accuracy": accuracy})
        )

    def measure(self) -> dict[str, float]:
        """Return loss and accuracies under the script's names."""
        model = self.trainer.model
        was_training = model.training
        model.eval()
        found = mmlu.score(model, self.rows, self.tokenizer, batch_size=self.batch_size)
        model.train(was_training)
        scores = mmlu.by_subject(found.right, self.subjects)
        results = {"mmlu_loss": found.loss}
        results |= {f"mmlu_{self.split}_accuracy_{subject}": value for subject, value in scores.items()}
        results[f"mmlu_{self.split}_accuracy"] = sum(scores.values()) / len(scores)
        return results
