"""What a run does otherwise where a model is not to write on: classification and sequence-to-sequence, a table.

The run itself (:mod:`halfbyte.train.run`) is the same: options, folder, checkpoints, resuming, events. Here is which
options say nothing then, how the trainer is made, and what is measured in evaluation.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from halfbyte import data, tables
from halfbyte.choices import IGNORED
from halfbyte.errors import InputError
from halfbyte.evaluate.labels import label_scores
from halfbyte.evaluate.references import reference_scores
from halfbyte.hf.models.configs import read_config
from halfbyte.hf.models.heads import check_task, classes_of, save_config
from halfbyte.hf.trainers.tasks import ClassifyConfig, ClassifyTrainer, Seq2SeqConfig, Seq2SeqTrainer, TaskCollator
from halfbyte.runs.config import TrainConfig

Measure = Callable[[Any], dict[str, float]]
CHAT = ("chat_template", "thinking", "train_on", "packing")
"""Options of conversations, and of rows that are packed."""


@dataclass(frozen=True)
class Task:
    """One kind of task.

    Attributes:
        unused: options that say nothing to it, and are refused.
        figures: what is measured in evaluation beside the loss.
        arguments: makes the trainer's configuration from what all trainers are told, and the rows.
        measure: makes what measures the predictions of an evaluation.
        trainer: makes the trainer.
    """

    unused: tuple[str, ...]
    figures: tuple[str, ...]
    arguments: Callable[[dict[str, Any], data.Prepared], Any]
    measure: Callable[[PreTrainedTokenizerBase], Measure]
    trainer: Callable[..., Any]


def _measure_classes(_: PreTrainedTokenizerBase) -> Measure:
    def measure(prediction: Any) -> dict[str, float]:
        return label_scores(prediction.label_ids.tolist(), logits_of(prediction).argmax(-1).tolist())

    return measure


def logits_of(prediction: Any) -> Any:
    """Return the logits ``[N, C]`` of an evaluation; some models give hidden states behind them."""
    predictions = prediction.predictions
    return predictions[0] if isinstance(predictions, tuple) else predictions


def _measure_texts(tokenizer: PreTrainedTokenizerBase) -> Measure:
    def texts(rows: Any) -> list[str]:
        kept = [row[row != IGNORED] for row in rows]
        return tokenizer.batch_decode(kept, skip_special_tokens=True)  # type: ignore[no-any-return]

    def measure(prediction: Any) -> dict[str, float]:
        return reference_scores(texts(prediction.predictions), texts(prediction.label_ids))

    return measure


def _seq2seq_arguments(common: dict[str, Any], rows: data.Prepared) -> Seq2SeqConfig:
    # With the start token and one more than the longest reference has, no cut answer passes for that reference.
    longest = int(tables.lengths(rows.evaluation.rows, "labels").max()) + 2 if rows.evaluation else None
    return Seq2SeqConfig(
        **common, remove_unused_columns=False, predict_with_generate=True, generation_max_length=longest
    )


TASKS: dict[str, Task] = {
    "classify": Task(
        unused=(*CHAT, "format"),
        figures=("accuracy", "f1", "matthews"),
        arguments=lambda common, _: ClassifyConfig(**common, remove_unused_columns=False),
        measure=_measure_classes,
        trainer=ClassifyTrainer,
    ),
    "seq2seq": Task(
        unused=CHAT,
        figures=("rouge_l", "exact_match"),
        arguments=_seq2seq_arguments,
        measure=_measure_texts,
        trainer=Seq2SeqTrainer,
    ),
}


def check_options(config: TrainConfig) -> None:
    """Refuse options that say nothing to the task of ``config``, and a model that is not for it.

    Raises:
        InputError: it names the option, or the model.
    """
    task = TASKS.get(config.task)
    if task is None:
        return
    if config.method != "sft":
        raise InputError(f"method {config.method} is for language models; with task {config.task} leave it out.")
    for name in task.unused:
        if getattr(config, name) not in (type(config).model_fields[name].default, False):
            raise InputError(f"option {name!r} says nothing to task {config.task}; leave it out.")
    if not (Path(config.model) / "adapter_config.json").is_file():  # told when it is loaded
        check_task(read_config(config.model, config.trust_remote_code), config.task, config.model)


def known_classes(config: TrainConfig) -> list[str] | None:
    """Return the names of the classes that the base model of a classifier knows, if it has any."""
    if config.task != "classify" or (Path(config.model) / "adapter_config.json").is_file():
        return None
    return classes_of(read_config(config.model, config.trust_remote_code))


def build_task_trainer(
    config: TrainConfig,
    common: dict[str, Any],
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: data.Prepared,
    optimizer: Any,
) -> Any:
    """Return the trainer of the task of ``config``; its ``figures`` name what its evaluations measure."""
    task = TASKS[config.task]
    trainer = task.trainer(
        model=model,
        args=task.arguments(common, rows),
        train_dataset=rows.train.rows,
        eval_dataset=rows.evaluation.rows if rows.evaluation else None,
        data_collator=TaskCollator(model, tokenizer.pad_token_id),
        processing_class=tokenizer,
        compute_metrics=task.measure(tokenizer),
        optimizers=(optimizer, None),
    )
    trainer.figures = task.figures
    return trainer


def logits_bytes(config: TrainConfig, model: Any, longest: int) -> int:
    """Return the bytes of a pass's logits, their softmax and gradient in fp32, where the head is not ours."""
    if config.task != "seq2seq":
        return 0
    return 3 * 4 * config.rows_a_pass * longest * int(model.config.get_text_config().vocab_size)


def preview(rows: data.Prepared, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return lines that show the first row as the model reads it, and what it is to say."""
    row = rows.train.rows[0]
    answer = list(rows.classes)[row["labels"][0]] if rows.classes else tokenizer.decode(row["labels"])
    return [f"row 1 ({row[tables.WHERE]}): {tokenizer.decode(row['input_ids'][:SHOWN])!r} → {answer!r}"]


SHOWN = 64
"""Tokens of a row that are shown."""


def save_beside(config: TrainConfig, model: Any, folder: Path) -> None:
    """Write what belongs beside the adapter of a classifier."""
    if config.task == "classify":
        save_config(model, folder)
