"""One training run, from a configuration to a run folder.

Everything cheap is checked first: the run folder, the data, the tokens; then the model is loaded. The folder:

    config.yaml                   every option; written first
    metrics.jsonl                 one line per optimizer step (``StepMetrics``), written as it happens
    checkpoints/step-000123/      while training; what ``resume`` goes on from (``hf/trainers/state.py``)
    adapter_model.safetensors     the result, a plain PEFT folder, with adapter_config.json and the tokenizer
    loss.png
    summary.json                  ``Summary``; written last, so a folder that has it holds a finished run

An interrupt (Ctrl-C) lets the step under way finish, saves a checkpoint and raises :class:`Interrupted`; a second one
stops at once. Resuming goes on bit for bit as if nothing had happened (at the same number of threads).
"""

import contextlib
import json
import logging
import os
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from matplotlib.figure import Figure
from peft import LoraConfig, get_peft_model
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerBase, TrainerCallback, set_seed
from transformers.utils import logging as transformers_logging

from halfbyte import data, hf, optim
from halfbyte.errors import InputError
from halfbyte.files import disk_full, whole_file, write_text
from halfbyte.hf.layers import activations
from halfbyte.hf.layers.targets import check_targets
from halfbyte.hf.trainers import SFTConfig, SFTTrainer
from halfbyte.hf.trainers.state import saved_states
from halfbyte.kernels import memory
from halfbyte.plan.machine import anonymous_memory, free_memory
from halfbyte.runs.config import CHANGEABLE, RUN_OPTIONS, TrainConfig
from halfbyte.train.display import Display, StepMetrics

RUN_FILES = ("config.yaml", "metrics.jsonl", "adapter_model.safetensors", "adapter_config.json", "summary.json")
FREE_SHARE = 0.9
"""Of the memory that is free, what a run takes where no budget was given."""
LOSS_STEPS = 10
"""The loss of a run is the mean over its last so many steps."""


@dataclass(frozen=True)
class Summary:
    """What a run came to; the content of ``summary.json``.

    Attributes:
        steps: optimizer steps.
        examples: rows of the data file.
        truncated: those of them that were cut to ``max_length``.
        trained_parameters: numbers in the adapter.
        trained_tokens: tokens with a label, each counted as often as it was trained on.
        loss: mean negative log-likelihood per trained token over the last ten steps, in nats.
        seconds: of training, loading apart.
        trained_tokens_per_second: over those seconds.
        peak_memory_bytes: the largest resident set of this process so far, mapped files included.
    """

    steps: int
    examples: int
    truncated: int
    trained_parameters: int
    trained_tokens: int
    loss: float
    seconds: float
    trained_tokens_per_second: float
    peak_memory_bytes: int


@dataclass(frozen=True)
class RunResult:
    """A finished run: its folder and its summary."""

    output: Path
    summary: Summary


class Interrupted(KeyboardInterrupt):
    """Training was interrupted after ``step`` steps; a checkpoint in ``output`` holds them."""

    def __init__(self, step: int, output: Path) -> None:
        super().__init__(f"Training was interrupted after step {step}; its checkpoint is kept in {output}.")
        self.step = step
        self.output = output


def fine_tune(config: TrainConfig, display: Display | None = None) -> RunResult:
    """Fine-tune a model as ``config`` says and leave the result in ``config.output``.

    Args:
        config: the options.
        display: is told of every step; nothing is shown by default.

    Raises:
        InputError: an option, the data, the model or the state of the run folder forbid the run, the disk is full,
            or training diverged.
        Interrupted: SIGINT came during training.
    """
    display = display or Display()
    with _quiet(), _full_disk_told(config.output):
        checkpoint = _check_folder(config)
        examples = data.read_examples(config.data)
        tokenizer = hf.load_tokenizer(config.model, trust_remote_code=config.trust_remote_code)
        rows = data.tokenize(examples, tokenizer, config.max_length)
        display.note(_describe(rows))
        display.note(f"Loading {config.model}")
        model = _load_model(config)
        trained, parameters = model.get_nb_trainable_parameters()
        display.note(f"Training {trained:,} parameters over {parameters - trained:,} frozen ones")
        display.note(f"Decoder layers {hf.describe_layers(model)}")
        policy = _plan_activations(config, model, rows)
        display.note(str(policy))
        if checkpoint:
            display.note(f"Going on from {checkpoint}")
        else:
            _clear_folder(config)
        activations.apply(model, policy, config.output)
        trainer = _trainer(config, model, tokenizer, rows)
        log = _Log(config.output, int(checkpoint.name.removeprefix("step-")) if checkpoint else 0, trainer, display)
        trainer.add_callback(log)
        try:
            with _interrupts(log):
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        finally:
            display.end()
            memory.release()
        if trainer.state.global_step < trainer.state.max_steps:
            raise Interrupted(trainer.state.global_step, config.output)
        summary = Summary(
            steps=trainer.state.global_step,
            examples=rows.examples,
            truncated=rows.truncated,
            trained_parameters=trained,
            trained_tokens=log.steps[-1].trained_tokens,
            loss=sum(step.loss for step in log.steps[-LOSS_STEPS:]) / len(log.steps[-LOSS_STEPS:]),
            seconds=log.steps[-1].elapsed,
            trained_tokens_per_second=log.steps[-1].trained_tokens / log.steps[-1].elapsed,
            peak_memory_bytes=_peak_memory(),
        )
        _finish(config.output, trainer, log.steps, summary)
    return RunResult(config.output, summary)


def _check_folder(config: TrainConfig) -> Path | None:
    """Return the checkpoint to go on from, if any; refuse a folder that this run may not write to."""
    output = config.output
    if output.exists() and not output.is_dir():
        raise InputError(f"{output} is a file; name a folder for the run.")
    if (output / "config.json").exists():
        raise InputError(f"{output} holds a model; name another folder for the run.")
    if config.overwrite or not any((output / name).exists() for name in RUN_FILES):
        return None
    if not config.resume:
        raise InputError(f"{output} already holds a run; set resume or overwrite, or name another folder.")
    if (output / "summary.json").exists():
        raise InputError(f"{output} holds a finished run; set overwrite, or name another folder.")
    before = TrainConfig.from_yaml(output / "config.yaml", {"output": output})
    for name in TrainConfig.model_fields:
        old, new = getattr(before, name), getattr(config, name)
        if old != new and name not in (*RUN_OPTIONS, *CHANGEABLE):
            raise InputError(
                f"{output} was begun with {name} {old!r} and cannot go on with {new!r}; "
                f"use its own config.yaml, or name another folder."
            )
    return next(reversed(saved_states(output)), None)


def _clear_folder(config: TrainConfig) -> None:
    """Remove what an earlier run left and begin this one."""
    for name in RUN_FILES:
        (config.output / name).unlink(missing_ok=True)
    shutil.rmtree(config.output / "checkpoints", ignore_errors=True)
    config.save(config.output / "config.yaml")


def _describe(rows: data.Tokenized) -> str:
    cut = f", {rows.truncated:,} of them cut" if rows.truncated else ""
    return f"{rows.examples:,} examples{cut}: {rows.tokens:,} tokens, {rows.trained_tokens:,} of them trained"


def _load_model(config: TrainConfig) -> Any:
    quantization = hf.HalfbyteConfig(
        quant_type=config.quant_type,
        blocksize=config.blocksize,
        double_quant=config.double_quant,
        compute_dtype=config.compute_dtype,
    )
    # An adapter's configuration names its base by this path, so it must not depend on the working directory.
    path = os.path.abspath(config.model) if os.path.isdir(config.model) else config.model
    model = hf.load(path, quantization_config=quantization, trust_remote_code=config.trust_remote_code)
    if hasattr(model, "peft_config"):
        raise InputError(f"{config.model} is an adapter; train on its base model, or merge it first.")
    if model.config.is_encoder_decoder or not model.can_generate():
        raise InputError(f"{config.model} ({type(model).__name__}) is not a causal language model.")
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=check_targets(model, config.target_modules),
        task_type="CAUSAL_LM",
    )
    set_seed(config.seed)
    try:
        model = get_peft_model(model, lora)
    except ValueError as error:
        raise InputError(f"target_modules {config.target_modules!r}: {error}") from error
    return hf.prepare_for_training(model)


def _trainer(config: TrainConfig, model: Any, tokenizer: PreTrainedTokenizerBase, rows: data.Tokenized) -> SFTTrainer:
    warm_constant = config.lr_scheduler_type == "constant" and config.warmup_ratio > 0
    arguments = SFTConfig(
        output_dir=str(config.output),
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        num_train_epochs=config.epochs,
        max_steps=config.max_steps or -1,
        learning_rate=config.learning_rate,
        lr_scheduler_type="constant_with_warmup" if warm_constant else config.lr_scheduler_type,
        warmup_steps=config.warmup_ratio,
        max_grad_norm=config.max_grad_norm,
        train_sampling_strategy="group_by_length" if config.group_by_length else "random",
        activation_checkpointing=False,  # the layers have been told (hf/layers/activations.py)
        seed=config.seed,
        save_steps=config.save_steps,
        logging_steps=1,
        logging_nan_inf_filter=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to="none",
        disable_tqdm=True,
        log_level="error",
    )
    optimizer = optim.create(
        config.optimizer,
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=1e-8,
        weight_decay=config.weight_decay,
        page_dir=config.output,
    )
    return SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=datasets.Dataset.from_list(rows.rows),
        data_collator=data.Collator(tokenizer.pad_token_id),
        processing_class=tokenizer,
        optimizers=(optimizer, None),
    )


def _plan_activations(config: TrainConfig, model: Any, rows: data.Tokenized) -> activations.Policy:
    """Choose which layers' activations are kept, as the memory allows."""
    free = int(FREE_SHARE * free_memory()) if config.memory is None else config.memory - anonymous_memory()
    length = max(len(row["input_ids"]) for row in rows.rows)
    recompute = config.gradient_checkpointing
    return activations.plan(model, length=length, batch_size=config.batch_size, free=free, recompute=recompute)


class _Log(TrainerCallback):  # type: ignore[misc]
    """Writes ``metrics.jsonl``, tells the display, and stops the run when it was interrupted."""

    def __init__(self, output: Path, first_step: int, trainer: SFTTrainer, display: Display) -> None:
        self.file = output / "metrics.jsonl"
        self.trainer = trainer
        self.display = display
        self.interrupted = False
        self.steps = _read_metrics(self.file, first_step) if first_step else []
        self.tokens_before = self.steps[-1].trained_tokens if self.steps else 0
        self.seconds_before = self.steps[-1].elapsed if self.steps else 0.0
        self.begun = self.step_begun = 0.0  # time.monotonic()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        write_text(self.file, "".join(map(_line, self.steps)))
        self.display.begin(state.global_step, state.max_steps)
        self.begun = time.monotonic()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.step_begun = time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if "loss" not in logs:
            return  # the closing summary
        now = time.monotonic()
        tokens = self.tokens_before + self.trainer.trained_tokens
        new_tokens = tokens - (self.steps[-1].trained_tokens if self.steps else 0)
        step = StepMetrics(
            step=state.global_step,
            epoch=logs["epoch"],
            loss=logs["loss"],
            learning_rate=logs["learning_rate"],
            grad_norm=logs["grad_norm"],
            trained_tokens=tokens,
            tokens_per_second=new_tokens / (now - self.step_begun),
            elapsed=self.seconds_before + now - self.begun,
        )
        self.steps.append(step)
        _append(self.file, _line(step))
        self.display.step(step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.interrupted:
            control.should_save = control.should_training_stop = True


def _line(step: StepMetrics) -> str:
    return json.dumps(asdict(step)) + "\n"


def _read_metrics(file: Path, steps: int) -> list[StepMetrics]:
    return [StepMetrics(**json.loads(line)) for line in file.read_text().splitlines()[:steps]]


def _append(file: Path, line: str) -> None:
    """Append ``line``, whole and on the disk before the step's checkpoint is, or leave the file as it was."""
    size = file.stat().st_size
    try:
        with file.open("a") as stream:
            stream.write(line)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError:
        os.truncate(file, size)
        raise


def _finish(output: Path, trainer: SFTTrainer, steps: list[StepMetrics], summary: Summary) -> None:
    """Put the results into the run folder, each file whole, the summary last; remove the checkpoints."""
    with tempfile.TemporaryDirectory(prefix=".adapter-", dir=output) as part:
        trainer.save_model(part)
        for file in Path(part).iterdir():
            with whole_file(output / file.name) as target:
                os.replace(file, target)
    with whole_file(output / "loss.png") as target:
        plot_loss(steps, target)
    write_text(output / "summary.json", json.dumps(asdict(summary), indent=2) + "\n")
    shutil.rmtree(output / "checkpoints")


def plot_loss(steps: list[StepMetrics], path: Path) -> None:
    """Draw the loss of each step, and its running mean over a twentieth of them, as a PNG."""
    window = max(1, len(steps) // 20)
    losses = torch.tensor([step.loss for step in steps], dtype=torch.float64)
    means = losses.unfold(0, window, 1).mean(1)
    numbers = [step.step for step in steps]
    middles = numbers[(window - 1) // 2 :][: len(means)]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(numbers, losses, color="tab:blue", alpha=0.3, marker=".", label="step")
    axes.plot(middles, means, color="tab:blue", label=f"mean of {window} steps")
    axes.set(xlabel="optimizer step", ylabel="loss (nats per trained token)", title="Training loss")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, format="png", dpi=150)


def _peak_memory() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@contextlib.contextmanager
def _interrupts(log: _Log) -> Iterator[None]:
    """While training, the first SIGINT asks for a stop after the step, the second one is a KeyboardInterrupt."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's
        return

    def ask(*_: Any) -> None:
        log.interrupted = True
        log.display.note("Interrupted: finishing this step and saving it; interrupt again to stop at once")
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the libraries' progress bars and log lines out of a run that has a display of its own."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    dataset_bars = datasets.are_progress_bars_disabled()
    trl_logger = logging.getLogger("trl")
    trl_level = trl_logger.level
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    trl_logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # what one library says to another about names of the next version
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
        if not dataset_bars:
            datasets.enable_progress_bars()
        trl_logger.setLevel(trl_level)


@contextlib.contextmanager
def _full_disk_told(output: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        if disk_full(error):
            raise InputError(
                f"{output}: the disk is full. Checkpoints that were saved are whole: free some space and resume."
            ) from error
        raise
