"""MMLU as ``qlora.py`` measures it: the likeliest of A, B, C and D behind each question (``MMLUEvalCallback``).

    accuracy of a subject = share of its questions in which P(right letter) is the greatest of the four
    accuracy              = mean over subjects;  loss = mean of −log P over letter and eos, in nats

The questions are the JSON lines that lie in the script's repository: ``data/mmlu/five_shot_mmlu_val.json`` and so on,
with ``input``, ``output`` (a letter) and ``subject``. Where there is no such file they are made of ``cais/mmlu`` on the
hub, in the form of Hendrycks' evaluation (``hendrycks/test``), which is that of the script's files:

    The following are multiple choice questions (with answers) about  SUBJECT.

    five times, or never: QUESTION, A. to D., "Answer: B", an empty line
    QUESTION, A. to D., "Answer:"
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import PreTrainedTokenizerBase, TrainerCallback

from halfbyte.choices import IGNORED
from halfbyte.data import Collator, hub
from halfbyte.data.sources import Source, read_source
from halfbyte.errors import InputError
from halfbyte.runs.events import Evaluation, Listener
from halfbyte.train.qlora.data import Placed, tokenize
from halfbyte.train.qlora.flags import Flags
from halfbyte.train.qlora.translate import MMLU, SPLITS

FOLDER = Path("data/mmlu")
LETTERS = "ABCD"
HUB = "cais/mmlu"
HEAD = "The following are multiple choice questions (with answers) about  {}.\n\n"


def read_questions(flags: Flags, folder: Path = FOLDER) -> list[dict[str, str]]:
    """Return the questions that the flags name.

    Raises:
        InputError: there is no file and no hub, or the file is none of questions.
    """
    shots, split = MMLU[flags["mmlu_dataset"]], SPLITS[flags["mmlu_split"]]
    path = (folder / f"{shots}_{split}.json").absolute()
    questions = _in_file(path) if path.is_file() else _on_hub(shots, split, path)
    return questions[: flags["max_mmlu_samples"]]


def _in_file(path: Path) -> list[dict[str, str]]:
    questions = []
    for where, row in read_source(Source(path=str(path))):
        if (
            not isinstance(row, dict)
            or not {"input", "output", "subject"} <= row.keys()
            or row["output"] not in tuple(LETTERS)
        ):
            raise InputError(f"{where} is no question of MMLU: it needs input, output (A, B, C or D) and subject.")
        questions.append({name: row[name] for name in ("input", "output", "subject")})
    return questions


def _on_hub(shots: str, split: str, path: Path) -> list[dict[str, str]]:
    try:
        rows = [row for _, row in hub.read(HUB, "all", "validation" if split == "val" else split)]
        before = [row for _, row in hub.read(HUB, "all", "dev")] if shots.startswith("five") else []
    except InputError as error:
        raise InputError(
            f"--do_mmlu_eval needs {path.name} in {path.parent}, as it lies in the script's repository (clone "
            f"https://github.com/artidoro/qlora and run there), or the hub: {error}"
        ) from error
    return questions_of(rows, before)


def questions_of(rows: Iterable[Mapping[str, Any]], before: Iterable[Mapping[str, Any]] = ()) -> list[dict[str, str]]:
    """Return rows of ``cais/mmlu`` (question, choices, answer, subject) as questions, behind solved ones."""
    solved: dict[str, str] = {}
    for row in before:
        solved[row["subject"]] = solved.get(row["subject"], "") + f"{_asked(row)} {LETTERS[row['answer']]}\n\n"
    return [
        {
            "subject": row["subject"],
            "input": HEAD.format(row["subject"].replace("_", " ")) + solved.get(row["subject"], "") + _asked(row),
            "output": LETTERS[row["answer"]],
        }
        for row in rows
    ]


def _asked(row: Mapping[str, Any]) -> str:
    choices = "".join(f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, row["choices"], strict=True))
    return f"{row['question']}{choices}\nAnswer:"


class MmluCallback(TrainerCallback):  # type: ignore[misc]
    """Measures the questions whenever the trainer evaluates, and logs what came of it as the script does."""

    def __init__(
        self,
        trainer: Any,
        questions: Sequence[dict[str, str]],
        tokenizer: PreTrainedTokenizerBase,
        flags: Flags,
        tell: Listener,
    ) -> None:
        self.trainer = trainer
        self.tell = tell
        self.split = flags["mmlu_split"]
        self.batch_size = flags["per_device_eval_batch_size"]
        self.subjects = [question["subject"] for question in questions]
        self.answers = torch.tensor([LETTERS.index(question["output"]) for question in questions])
        placed = [Placed("", {name: question[name] for name in ("input", "output")}) for question in questions]
        cut = flags.but(source_max_len=flags["mmlu_source_max_len"], train_on_source=False)
        self.rows = [encoded.rows[0] for encoded in tokenize(placed, tokenizer, cut)]
        self.letters = torch.tensor([tokenizer(letter, add_special_tokens=False).input_ids[0] for letter in LETTERS])

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        results = self.measure()
        self.trainer.log(dict(results))
        accuracy = results[f"mmlu_{self.split}_accuracy"]
        self.tell(
            Evaluation(step=state.global_step, figures={"mmlu_loss": results["mmlu_loss"], "mmlu_accuracy": accuracy})
        )

    @torch.inference_mode()
    def measure(self) -> dict[str, float]:
        """Return loss and accuracies under the script's names."""
        model = self.trainer.model
        was_training = model.training
        model.eval()
        right = torch.zeros(len(self.rows), dtype=torch.bool)
        loss, tokens = 0.0, 0
        by_length = sorted(range(len(self.rows)), key=lambda i: -len(self.rows[i]["input_ids"]))
        collate = Collator(pad_token_id=None)
        for start in range(0, len(by_length), self.batch_size):
            numbers = by_length[start : start + self.batch_size]
            batch = collate(self.rows[number] for number in numbers)
            targets = batch.pop("labels")[:, 1:]
            columns = (targets != IGNORED).any(0).nonzero().squeeze(1)
            targets = targets[:, columns]
            logits = model(**batch, logits_to_keep=columns, use_cache=False).logits.float()
            loss += functional.cross_entropy(
                logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
            ).item()
            tokens += int((targets != IGNORED).sum())
            first = (targets != IGNORED).int().argmax(1)
            chosen = logits[torch.arange(len(numbers)), first][:, self.letters].argmax(1)
            right[numbers] = chosen == self.answers[numbers]
        model.train(was_training)
        results = {"mmlu_loss": loss / tokens}
        scores = []
        for subject in dict.fromkeys(self.subjects):
            own = torch.tensor([name == subject for name in self.subjects])
            scores.append(float(right[own].float().mean()))
            results[f"mmlu_{self.split}_accuracy_{subject}"] = scores[-1]
        results[f"mmlu_{self.split}_accuracy"] = sum(scores) / len(scores)
        return results
