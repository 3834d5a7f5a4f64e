"""One run of ``qlora.py``'s command line: its stages and its files, over our model, trainer and memory plan.

What differs from the script, on purpose:

- ``checkpoint-N`` holds the optimizer and all else, and a run goes on from it bit for bit. The script loads the adapter
  and begins again at step 0; so does this where a checkpoint holds an adapter alone, as the script's own do.
- Where ``completed`` is, nothing is trained again, and the last adapter is evaluated; the script trains a new one.
- The loss of a step is the mean over its tokens. The script's is the mean of its batches' means.
- LoRA's weights are fp32. The script holds them in bf16 with ``--bf16``.
- Answers are generated from prompts padded on the left, and end at the eos token.
"""

import contextlib
import dataclasses
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_utils import speed_metrics

from halfbyte import data as rows_of
from halfbyte import hf
from halfbyte.errors import InputError
from halfbyte.hf.layers import activations
from halfbyte.hf.models.configs import config_at
from halfbyte.hf.models.hub import locate
from halfbyte.hf.models.limits import check_length, check_tokens
from halfbyte.hf.trainers import distributed
from halfbyte.hf.trainers.qlora import ADAPTER, QloraTrainer
from halfbyte.memory import free_memory
from halfbyte.quiet import quiet
from halfbyte.runs.circumstances import Circumstances
from halfbyte.runs.config import TrainConfig
from halfbyte.runs.events import Checkpoint, Event, Listener, Note, Progress, Stage, StepMetrics
from halfbyte.runs.folder import RunFolder
from halfbyte.runs.metrics import MetricsFile
from halfbyte.train import worlds
from halfbyte.train.build import build_model, plan_activations
from halfbyte.train.fingerprints import check_resumed, fingerprint_of, keep_with
from halfbyte.train.inputs import digests
from halfbyte.train.packing import plan_step
from halfbyte.train.qlora import data, together
from halfbyte.train.qlora.arguments import generation_settings, trainer_arguments
from halfbyte.train.qlora.flags import Flags
from halfbyte.train.qlora.mmlu import MmluCallback, read_questions
from halfbyte.train.qlora.outputs import Outputs, adapter_options
from halfbyte.train.qlora.translate import Translated, translate
from halfbyte.train.run import end_told, full_disk_told
from halfbyte.train.steps import Steps
from halfbyte.train.stop import Interrupted, Stop


@dataclasses.dataclass(frozen=True)
class Begun:
    """What a run begins with.

    Attributes:
        flags: with the adapter's own rank and so on, where there is one.
        config: the same for model, memory and folder.
        checkpoint: the newest one, if any.
        resumable: whether it holds the whole state of a run of ours.
        train: whether there is something to train.
        notes: a sentence each.
    """

    flags: Flags
    config: TrainConfig
    checkpoint: Path | None
    resumable: bool
    train: bool
    notes: list[str]


def qlora(given: Flags, *listeners: Listener) -> dict[str, Any]:
    """Do what the flags say, and leave the script's files in ``output_dir``.

    Args:
        given: of :func:`halfbyte.train.qlora.flags.parse`.
        listeners: are told every event of the run.

    Returns:
        The figures of ``metrics.json``.

    Raises:
        InputError: a flag, the data, the model or the folder forbid the run.
        Interrupted: SIGINT or SIGTERM came during training; the same command goes on.
    """
    metrics = MetricsFile()
    everybody: tuple[Listener, ...] = (metrics, *listeners)

    def tell(event: Event) -> None:
        if distributed.is_first():
            for listener in everybody:
                listener(event)

    def note(text: str) -> None:
        tell(Note(text=text))

    translated = translate(given)
    folder = RunFolder(translated.config().output)
    outputs = Outputs(folder.path)
    with quiet(), distributed.joined(), full_disk_told(folder.path), contextlib.ExitStack() as held:
        with distributed.agreed_errors():
            translated = together.settle(translated, folder)
            folder.check(translated.config().model_copy(update={"overwrite": True}))
            with distributed.first_writes() as writes:
                if writes:
                    held.enter_context(folder.locked())
            begun = begin(translated, folder, outputs)
            together.check_start(begun.flags, begun.config, folder, begun.checkpoint)
            flags, config = begun.flags, begun.config
            if not (begun.train or flags["do_eval"] or flags["do_predict"]):
                for line in begun.notes:
                    note(line)
                return {"run_name": flags["run_name"]}
            arguments = trainer_arguments(flags, folder.path)
            for line in begun.notes:
                note(line)
            tokenizer, rows, prepared = _read(flags, config, tell)
            worlds.check_inputs(config, digests(config, tokenizer, prepared))
            questions = read_questions(flags) if flags["do_mmlu_eval"] else None
            model = _load(config, tokenizer, prepared, tell)
            base = fingerprint_of(model, config)
            is_known = begun.checkpoint is not None and check_resumed(folder.path, begun.checkpoint / ADAPTER, base)
        before: list[StepMetrics] = []
        packer = None
        if begun.train:
            tell(Stage(name="plan", text="Planning the memory of a step"))
            before, packer = _begin_training(begun, folder, outputs, model, prepared, metrics, note, is_known)
        trainer = QloraTrainer(
            model=model,
            args=arguments,
            train_dataset=prepared.train.rows,
            eval_dataset=prepared.evaluation.rows if prepared.evaluation else None,
            data_collator=rows_of.Collator(tokenizer.pad_token_id),
            processing_class=tokenizer,
            packer=packer,
        )
        keep_with(trainer, config, base)
        if begun.checkpoint and not (begun.train and begun.resumable):
            trainer._load_from_checkpoint(str(begun.checkpoint / ADAPTER))
        stop = Stop()
        steps = LoggedSteps(trainer, before, stop, tell)
        trainer.add_callback(steps)
        if questions:
            trainer.add_callback(MmluCallback(trainer, questions, tokenizer, flags, tell))

        figures: dict[str, Any] = {"run_name": flags["run_name"]}
        if begun.train:
            last = str(begun.checkpoint) if begun.checkpoint and begun.resumable else None
            with end_told(trainer, tell), stop.listening(note):
                result = trainer.train(resume_from_checkpoint=last)
                if trainer.state.global_step < trainer.state.max_steps:
                    raise Interrupted(trainer.state.global_step, folder.path)
            _save(trainer, "train", result.metrics, figures)
            trainer.save_state()
            outputs.finish_training(trainer)
        if flags["do_eval"]:
            _save(trainer, "eval", trainer.evaluate(metric_key_prefix="eval"), figures)
        if flags["do_predict"] and distributed.is_first():
            _save(trainer, "predict", predict(trainer.model, tokenizer, rows.held_out, flags, outputs), figures)
        if distributed.is_first():
            outputs.write_metrics(figures)
    return figures


def begin(translated: Translated, folder: RunFolder, outputs: Outputs) -> Begun:
    """Look what output_dir holds, and return what the run begins with.

    Raises:
        InputError: the run in it is of other options, or its adapter is.
    """
    flags, notes = translated.flags, [*translated.notes]
    afresh = flags["overwrite_output_dir"] and flags["do_train"]
    checkpoint = None if afresh else outputs.last_checkpoint(flags["load_best_model_at_end"], notes.append)
    completed = outputs.completed.exists() and not afresh
    train = flags["do_train"] and not completed
    if completed and flags["do_train"]:
        notes.append(
            f"Detected that training was already completed ({outputs.completed}): nothing is trained. Set "
            "--overwrite_output_dir, or name another output_dir, to train anew"
        )
    resumable = checkpoint is not None and (checkpoint / "state.json").is_file()
    if checkpoint:
        found = adapter_options(checkpoint)
        for name, value in found.items():
            given = flags.given.get(name, value)
            if given != value and not (name == "lora_modules" and given == "all") and name != "lora_dropout":
                raise InputError(
                    f"{checkpoint} holds an adapter with {name} {value}, and --{name} is {given}; leave it out, or "
                    "name another output_dir."
                )
        notes.append(f"Found a previous checkpoint at: {checkpoint}")
        if not resumable and train:
            notes.append("It holds an adapter without a state to go on from, so training begins at step 0 over it")
        if not resumable or not train:
            flags = flags.but(**{name: value for name, value in found.items() if name not in flags.given})
    config = dataclasses.replace(translated, values=translated.values | _lora_values(flags)).config()
    if train and resumable and folder.begun:
        folder.check(config.model_copy(update={"resume": True}))
    return Begun(flags, config, checkpoint, resumable, train, notes)


def _lora_values(flags: Flags) -> dict[str, Any]:
    modules = flags["lora_modules"]
    targets = "all-linear" if modules == "all" else [name.strip() for name in modules.split(",")]
    return {
        "rank": flags["lora_r"],
        "lora_alpha": flags["lora_alpha"],
        "lora_dropout": flags["lora_dropout"],
        "target_modules": targets,
    }


def _read(flags: Flags, config: TrainConfig, tell: Listener) -> tuple[Any, data.Rows, rows_of.Prepared]:
    tell(Stage(name="data", text=f"Reading {flags['dataset']}"))

    def progress(_: int, done: int, size: int) -> None:
        tell(Progress(done=done, total=size, unit="bytes"))

    tokenizer = hf.load_tokenizer(config.model, trust_remote_code=config.trust_remote_code)
    about = config_at(locate(config.model), config.trust_remote_code).get_text_config()
    for line in data.equip(tokenizer, about, flags["model_name_or_path"]):
        tell(Note(text=line))
    rows = data.read(flags, progress)
    prepared = data.prepare(rows, tokenizer, flags)
    for line in prepared.told():
        tell(Note(text=line))
    return tokenizer, rows, prepared


def _load(config: TrainConfig, tokenizer: Any, rows: rows_of.Prepared, tell: Listener) -> Any:
    tell(Stage(name="model", text=f"Loading {config.model}"))
    try:
        model = build_model(config)
    except InputError as error:
        words = re.sub(r"^target_modules\b", "--lora_modules", re.sub(r"^rank\b", "--lora_r", str(error)))
        raise InputError(words.partition(", for that layer alone with rank_pattern")[0].rstrip(".") + ".") from None
    check_tokens(model, tokenizer, rows.largest_id, "The data")
    check_length(model, rows.longest, "The longest row of the data", "set smaller source_max_len and target_max_len")
    trained, parameters = model.get_nb_trainable_parameters()
    frozen = parameters - trained
    tell(Note(text=f"Training {trained:,} parameters over {frozen:,} frozen ones, {hf.describe_base(model)}"))
    tell(Note(text=f"Decoder layers {hf.describe_layers(model)}"))
    tell(Note(text=f"Attention {hf.describe_attention(model)}"))
    return model


def _begin_training(
    begun: Begun,
    folder: RunFolder,
    outputs: Outputs,
    model: Any,
    rows: rows_of.Prepared,
    metrics: MetricsFile,
    note: Any,
    base_is_known: bool,
) -> tuple[list[StepMetrics], rows_of.Packer | None]:
    """Plan a step, and begin the folder or go on in it; return the steps made before and what packs a step's rows."""
    config = begun.config
    if config.memory is not None and config.memory >= free_memory():
        config = config.model_copy(update={"memory": None})
    goes_on = begun.checkpoint is not None and begun.resumable and folder.begun
    try:
        if goes_on:
            tokens = folder.packed_tokens()
            policy = plan_activations(config, model, rows.longest, tokens)
        else:
            policy, tokens = plan_step(config, model, rows, note)
    except InputError as error:
        text = str(error).replace("max_length", "source_max_len and target_max_len")
        raise InputError(text.replace("raise memory", "raise max_memory_MB")) from None
    note(str(policy))
    circumstances = Circumstances.here(config.model, distributed.world_size())
    before: list[StepMetrics] = []
    with distributed.first_writes() as writes:
        if goes_on:
            for change in folder.compare(circumstances, base_is_known):
                note(f"{change}: the result may differ in its last bits from that of the uninterrupted run")
        elif writes:
            if begun.checkpoint is None:
                outputs.remove()
            folder.begin(begun.config, circumstances, None, tokens)
        if writes:
            assert begun.checkpoint or not goes_on
            step = int(begun.checkpoint.name.rpartition("-")[2]) if begun.checkpoint and goes_on else 0
            before = metrics.open(folder.metrics, step)
    activations.apply(model, policy, folder.path)
    return before, None if tokens is None else rows_of.Packer(tokens)


class LoggedSteps(Steps):
    """Tells what the trainer logs, which may be every tenth step."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.step_begun:  # since the last log
            super().on_step_begin(args, state, control, **kwargs)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if "loss" in logs:
            super().on_log(args, state, control, logs, **kwargs)
            self.step_begun = 0.0

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        folder = self.trainer.state_folder(state.global_step)
        self.tell(Checkpoint(step=state.global_step, folder=folder.name))


def _save(trainer: Any, part: str, metrics: dict[str, Any], figures: dict[str, Any]) -> None:
    trainer.save_metrics(part, metrics)
    figures.update(metrics)


@contextlib.contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@torch.inference_mode()
def predict(model: Any, tokenizer: Any, rows: list[data.Placed], flags: Flags, outputs: Outputs) -> dict[str, float]:
    """Answer the held-out rows, write them with their answers, and return how fast that was."""
    settings = generation_settings(flags, tokenizer)
    sources = [ids for ids, _ in data.source_ids([row.pair for row in rows], tokenizer, flags["source_max_len"])]
    sources = [ids or [tokenizer.eos_token_id] for ids in sources]
    size, begun = flags["per_device_eval_batch_size"], time.time()
    written: list[dict[str, Any]] = []
    torch.manual_seed(flags["seed"])
    with _evaluating(model):
        for start in range(0, len(rows), size):
            batch = sources[start : start + size]
            longest = max(len(ids) for ids in batch)
            padded = torch.tensor([[settings.pad_token_id] * (longest - len(ids)) + ids for ids in batch])
            mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in batch])
            batched = {"input_ids": padded.to(model.device), "attention_mask": mask.to(model.device)}
            answers = model.generate(**batched, generation_config=settings)
            for row, ids, answer in zip(rows[start : start + size], batch, answers, strict=True):
                text = tokenizer.decode(answer[longest - len(ids) :], skip_special_tokens=True)
                length = {"length": sum(map(len, row.pair.values()))} if flags["group_by_length"] else {}
                prediction = text.replace(row.pair["input"], "").strip()
                written.append({**row.pair, **length, "prediction_with_input": text.strip(), "prediction": prediction})
    outputs.write_predictions(written)
    figures: dict[str, float] = speed_metrics("predict", begun, len(rows), -(-len(rows) // size))
    return figures
