"""One training run, from its options to a finished run folder (:mod:`halfbyte.runs.folder`).

Everything cheap is checked first: the folder, the data, the tokens; then the model is loaded. An interrupt (Ctrl-C or
SIGTERM) lets the step under way finish, saves a checkpoint and raises :class:`Interrupted`; a second one stops at once.
Resuming goes on bit for bit as if nothing had happened, in the circumstances that the folder records; what is other
than it was is told, or refused.
"""

import contextlib
import functools
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from halfbyte import data, devices, hf
from halfbyte.checksums import about, step_of
from halfbyte.data.prepared import give_plain
from halfbyte.data.samples import preview_lines
from halfbyte.data.stops import check_tokenizer, stop_ids, trained_stop
from halfbyte.errors import InputError, counted
from halfbyte.files import disk_full, remove_folder, unwritable, whole_file, write_text
from halfbyte.hf.layers import activations
from halfbyte.hf.models.heads import set_pad
from halfbyte.hf.models.limits import check_length, check_tokens, most_positions
from halfbyte.hf.models.new_tokens import NewToken
from halfbyte.hf.models.stops import check_stop_token, save_stops
from halfbyte.hf.trainers import distributed
from halfbyte.kernels import pool
from halfbyte.plan.estimate import KEPT_CHECKPOINTS
from halfbyte.quiet import quiet
from halfbyte.runs.circumstances import Circumstances
from halfbyte.runs.config import TrainConfig
from halfbyte.runs.events import End, Event, Listener, Note, Progress, Stage, StepMetrics
from halfbyte.runs.folder import RunFolder
from halfbyte.runs.metrics import MetricsFile, is_as, read_events
from halfbyte.runs.report.writer import ReportFile
from halfbyte.train import course, loggers, schedules, space, worlds
from halfbyte.train.adapters import Beginning, collator
from halfbyte.train.batch import fit_batch, with_batch
from halfbyte.train.best import Best, Heard
from halfbyte.train.build import build_model, build_trainer, page, paging_told, plan_activations
from halfbyte.train.fingerprints import check_resumed, fingerprint_of, keep_with
from halfbyte.train.giving_back import GiveBack
from halfbyte.train.inputs import digests
from halfbyte.train.methods import Method, check_rows, method_of
from halfbyte.train.packing import plan_step
from halfbyte.train.prediction import Prediction
from halfbyte.train.report import Summary, describe_data, plot_loss, summarize
from halfbyte.train.rows import opened_tokenizer, prepared
from halfbyte.train.saving import SaveByTime
from halfbyte.train.steps import Steps, steps_of
from halfbyte.train.stop import Interrupted, Stop
from halfbyte.train.tasks import TASKS, check_classes, check_options, preview, save_beside
from halfbyte.train.watch import Watch, check_general, notices_of


@dataclass(frozen=True)
class RunResult:
    """A finished run: its folder and its summary."""

    output: Path
    summary: Summary


def fine_tune(config: TrainConfig, *listeners: Listener) -> RunResult:
    """Fine-tune a model as ``config`` says and leave the result in ``config.output``.

    Args:
        config: the options.
        listeners: are told every event of the run (:mod:`halfbyte.runs.events`), beside ``metrics.jsonl``.

    Raises:
        InputError: an option, the data, the model or the state of the run folder forbid the run, the disk is full,
            or training diverged.
        Interrupted: SIGINT or SIGTERM came during training.
    """
    metrics = MetricsFile()
    report = ReportFile(RunFolder(config.output), lambda text: note(text))
    everybody: tuple[Listener, ...] = (metrics, report, *listeners)

    def tell(event: Event) -> None:
        if distributed.is_first():
            for listener in everybody:
                listener(event)

    def note(text: str) -> None:
        tell(Note(text=text))

    method = method_of(config)
    schedules.check(config)
    loggers.check(config)
    check_options(config)
    devices.check(config.device)
    folder = RunFolder(config.output)
    with quiet(), distributed.joined(), full_disk_told(folder.path), contextlib.ExitStack() as held:
        with distributed.agreed_errors():
            config = worlds.settle(config, folder)
            folder.check(config)
            with distributed.first_writes() as writes:
                if writes:
                    held.enter_context(folder.locked())
            checkpoint = _checkpoint(folder, config, note)
            worlds.check_start(config, folder, checkpoint)
            check_general(config)
            tokenizer, added, rows = _read(config, method, tell)
            inputs = digests(config, tokenizer, rows)
            worlds.check_inputs(config, inputs)
            if checkpoint:
                folder.compare_inputs(inputs)
            begun_as, config = config, worlds.as_begun(config, folder, note) if checkpoint else config
            prediction = None if checkpoint else Prediction(config, method, rows)
            beginning = Beginning(config, added, rows.train.rows, collator(tokenizer), checkpoint)
            model = _load(config, beginning, tokenizer, rows, tell)
            base = fingerprint_of(model, config)
            base_is_known = checkpoint is not None and check_resumed(folder.path, checkpoint, base)
            measured = TASKS[config.task].figures if config.task in TASKS else method.figures
            watch = Watch(config, model, tokenizer, rows, measured, tell)
        tell(Stage(name="plan", text="Planning the memory of a step"))
        if checkpoint:  # what a pass holds decides about bits
            tokens = folder.packed_tokens()
            fitted = with_batch(config, folder.rows_a_pass() or config.rows_a_pass)
            policy = plan_activations(fitted, model, rows.longest, tokens, method.sequences)
        else:
            fitted = fit_batch(config, model, rows, note)
            policy, tokens = plan_step(fitted, model, rows, note)
        note(str(policy))

        activations.apply(model, policy, folder.path)
        packer = None if tokens is None else data.Packer(tokens)
        trainer = build_trainer(fitted, method, model, tokenizer, rows, begin=checkpoint is None, packer=packer)
        page(fitted, model, trainer, policy)
        keep_with(trainer, config, base)
        begun = functools.partial(folder.begin, begun_as, skipped=rows.skipped, packed_tokens=tokens, inputs=inputs)
        begun = functools.partial(begun, rows_a_pass=fitted.rows_a_pass)
        before = _begin(folder, begun_as, checkpoint, trainer, begun, metrics, note, base_is_known)
        stop = Stop()
        heard = Heard(tell, notices_of(config, model))
        heard.recall(read_events(folder.metrics) if checkpoint else ())
        steps = Steps(trainer, before, stop, heard, watch.figures)
        trainer.add_callback(steps)
        watch.attach(trainer, heard, begins=checkpoint is None)
        if config.memory is not None or policy.paged is not None:
            trainer.add_callback(GiveBack())
        if config.save_minutes:
            trainer.add_callback(SaveByTime(config.save_minutes))
        best = Best(trainer, config, note)
        done = step_of(checkpoint) if checkpoint else 0
        with end_told(trainer, tell), stop.listening(note), loggers.reporting(trainer, config, done, note):
            began = time.perf_counter()
            best.train(checkpoint)
            if told := paging_told(model, time.perf_counter() - began):
                note(told)
            if not best.is_over:
                raise Interrupted(trainer.state.global_step, folder.path)
            foretold = prediction.tell(steps.made, note) if prediction else {}
        kept = best.deliver(heard.evaluations)
        trained = hf.count_parameters(model)[0]
        facts = (rows.train.counts, trained, heard.evaluations, config.metric_for_best, kept)
        with distributed.first_writes() as writes:  # the others know none of the steps of before
            own = summarize(steps.made, *facts, foretold=foretold) if writes else None
        [summary, *_] = distributed.gather(own)
        _finish(folder, config, trainer, tokenizer, steps, summary, report)
    return RunResult(folder.path, summary)


def _read(config: TrainConfig, method: Method, tell: Listener) -> tuple[Any, list[NewToken], data.Prepared]:
    """Return the tokenizer, the tokens that were added to it, and the data as rows of its tokens."""
    tell(Stage(name="data", text=f"Reading {data.named_sources(config.data)}"))

    def progress(_: int, done: int, size: int) -> None:
        tell(Progress(done=done, total=size, unit="bytes"))

    tokenizer, added = opened_tokenizer(config, lambda text: tell(Note(text=text)))
    with distributed.first_writes() as writes:
        rows = prepared(config, method, tokenizer, progress) if writes else None
    rows = rows or prepared(config, method, tokenizer, progress)  # found in the cache
    for line in give_plain(tokenizer, rows):
        tell(Note(text=line))
    shown = preview_lines(rows.train, tokenizer)[1:] if config.task == "lm" else preview(rows, tokenizer)
    for line in [*rows.told(), *check_rows(config, rows.train), *shown]:
        tell(Note(text=line))
    tell(describe_data(rows, config.seed))
    return tokenizer, added, rows


def _load(config: TrainConfig, beginning: Beginning, tokenizer: Any, rows: data.Prepared, tell: Listener) -> Any:
    """Return the model with its adapter, held to be one that these rows can be trained on."""
    check_classes(config, list(rows.classes))
    tell(Stage(name="model", text=f"Loading {config.model}"))
    model = build_model(config, beginning, list(rows.classes))
    if config.task == "classify":
        set_pad(model, tokenizer)
    name = f"The data ({data.named_sources(config.data)})"
    check_tokens(model, tokenizer, rows.largest_id, name)
    check_length(model, rows.longest, "The longest row of the data", f"set max_length to {most_positions(model)}")
    for line in _stops_told(model, tokenizer) if config.task == "lm" else ():
        tell(Note(text=line))
    trained, parameters = model.get_nb_trainable_parameters()
    share = hf.describe_base(model)
    tell(Note(text=f"Training {trained:,} parameters over {parameters - trained:,} frozen ones, {share}"))
    tell(Note(text=f"{'Decoder layers' if config.task == 'lm' else 'Layers'} {hf.describe_layers(model)}"))
    tell(Note(text=f"Attention {hf.describe_attention(model)}"))
    return model


def _stops_told(model: Any, tokenizer: Any) -> list[str]:
    stop = trained_stop(tokenizer)
    unknown = [] if stop is None else check_stop_token(model.get_base_model(), tokenizer, [stop])
    return [*check_tokenizer(tokenizer, model.generation_config.eos_token_id), *unknown]


def _checkpoint(folder: RunFolder, config: TrainConfig, note: Callable[[str], None]) -> Path | None:
    """Return the checkpoint that the run goes on from, if it goes on; tell of those that cannot be."""
    if not folder.check(config):
        return None
    checkpoint, damaged = folder.checkpoint()
    for line in damaged:
        note(f"Not to be gone on from: {line}; the checkpoint before it is taken")
    if checkpoint is None:
        told = read_events(folder.metrics) if folder.metrics.exists() else ()
        made = sum(isinstance(event, StepMetrics) for event in told)
        again = f"; its {counted(made, 'step')} are made again" if made else ""
        note(f"{folder.path} has no checkpoint to go on from, so the run begins anew{again}")
    return checkpoint


def _begin(
    folder: RunFolder,
    config: TrainConfig,
    checkpoint: Path | None,
    trainer: Any,
    begin: Callable[[Circumstances], None],
    metrics: MetricsFile,
    note: Callable[[str], None],
    base_is_known: bool,
) -> list[StepMetrics]:
    """Begin the run folder, or go on in it from ``checkpoint``; return the steps that were made before."""
    circumstances = Circumstances.here(config.model, distributed.world_size())
    with distributed.first_writes() as writes:
        changed = course.course(trainer, checkpoint) if checkpoint and folder.gets_more(config) else None
        if writes:
            space.check(trainer, folder.path, _saves(config, course.total_steps(trainer)), folder.saved_bytes())
        if checkpoint:
            for change in folder.compare(circumstances, base_is_known):
                note(f"{change}: the result may differ in its last bits from that of the uninterrupted run")
            note(f"Going on from {checkpoint}")
            if changed:
                note(changed[1])
            if writes:
                folder.go_on(config, changed and changed[0])
        elif writes:
            begin(circumstances)
        if checkpoint and writes and (saved := about(checkpoint).get("metrics")) and not is_as(folder.metrics, saved):
            note(
                f"{folder.metrics} is not as it was when {checkpoint.name} was saved: what can be read of it stays, "
                "and what it says of earlier steps may be wrong"
            )
        before = []
        if checkpoint and writes:
            before = metrics.open(folder.metrics, step_of(checkpoint), steps_of(checkpoint))
            if metrics.lacked:
                note(
                    f"{folder.metrics} lacked {metrics.lacked} of the steps that were made: their losses are those of "
                    "the checkpoint, their tokens, time and memory are not known"
                )
        elif writes:
            metrics.open(folder.metrics)
    trainer.run_id = folder.run_id()
    trainer.beside_it = lambda: {"metrics": metrics.digest()}
    trainer.passed_over = [path for path in folder.saved() if checkpoint and step_of(path) > step_of(checkpoint)]
    return before


def _saves(config: TrainConfig, steps: int) -> int:
    """Return how many checkpoints there will be at most at a time."""
    planned = steps if config.save_minutes else -(-steps // config.save_steps)
    return min((config.keep or KEPT_CHECKPOINTS) + config.keep_best + 1, planned + config.keep_best)


def _finish(
    folder: RunFolder,
    config: TrainConfig,
    trainer: Any,
    tokenizer: Any,
    steps: Steps,
    summary: Summary,
    report: ReportFile,
) -> None:
    """Put the results into the run folder, each file whole, the summary last; remove the checkpoints."""
    part = folder.path / ".adapter"
    trainer.save_model(str(part))
    if distributed.is_first():
        if config.task == "lm":
            save_stops(trainer.model, tokenizer, stop_ids(tokenizer), part)
        save_beside(config, trainer.model, part)
    with distributed.first_writes() as writes:
        if writes:
            for file in part.iterdir():
                with whole_file(folder.path / file.name) as target:
                    os.replace(file, target)
            part.rmdir()
            with whole_file(folder.curve) as target:
                plot_loss(steps.made, target, "label" if config.task == "classify" else "trained token")
            report.finish(asdict(summary))
            write_text(folder.summary, json.dumps(asdict(summary), indent=2) + "\n")
            if not config.keep:
                with contextlib.suppress(OSError):
                    remove_folder(folder.checkpoints)


@contextlib.contextmanager
def end_told(trainer: Any, tell: Listener) -> Iterator[None]:
    """Tell that training is over and why, and give the memory of its steps back."""

    def end(reason: Any, error: str = "") -> None:
        tell(End(step=trainer.state.global_step, reason=reason, error=error))

    try:
        yield
    except BaseException as error:
        with contextlib.suppress(OSError):  # a full disk, told by the first error
            if isinstance(error, KeyboardInterrupt):
                end("interrupted")
            else:
                end("failed", str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}")
        raise
    else:
        end("finished")
    finally:
        pool.release()


@contextlib.contextmanager
def full_disk_told(output: Path) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # safetensors and tokenizers raise their own
        if disk_full(error):
            raise InputError(
                f"{output}: the disk is full. Checkpoints that were saved are whole: free some space and resume."
            ) from error
        if unwritable(error, output):
            raise InputError(
                f"{output} cannot be written any more ({getattr(error, 'strerror', None) or error}). Checkpoints that "
                "were saved are whole: make it writable and resume."
            ) from error
        raise
