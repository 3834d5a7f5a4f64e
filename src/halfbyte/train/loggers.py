"""Whom a run reports to beside its folder: loggers that transformers (5.23) has, each with a package of its own.

A run is one run there too, however often it is resumed, and ends there as it ended here:

    tensorboard   files in the run folder; a resumed run's tells TensorBoard to drop what it holds of later steps
    trackio       goes by the name of a run, which therefore has the beginning of the run's id
    wandb         the run's id is the one that W&B goes by; what is not sent at once lies in the run folder
    mlflow        the run is found by its tag ``halfbyte.run``, wherever MLflow keeps its runs

The last three cannot take back what they have heard: steps that are made again after a kill stand there twice.
"""

import contextlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

from transformers.integrations import MLflowCallback, TensorBoardCallback, TrackioCallback, WandbCallback

from halfbyte.errors import InputError
from halfbyte.hf.trainers import distributed
from halfbyte.runs.config import TrainConfig
from halfbyte.runs.folder import RunFolder

PACKAGES = {name: (name,) for name in ("tensorboard", "trackio", "wandb", "mlflow")} | {
    "tensorboard": ("tensorboard", "tensorboardX")
}
"""Packages of which one has to be there."""
ID_SHOWN = 6
"""Letters of a run's id that its name has."""
INTERRUPTED = 130
"""What W&B takes for the exit code of a process that was interrupted."""


def check(config: TrainConfig) -> None:
    """Refuse a logger whose package is not installed, and W&B where it has no login and is not told to do without.

    Raises:
        InputError: it says what to do.
    """
    for name in config.loggers:
        if not any(map(_is_installed, PACKAGES[name])):
            raise InputError(f"report_to {name} needs a package that is not installed: pip install {name}.")
    if "wandb" in config.loggers and os.environ.get("RANK", "0") == "0":
        import wandb

        if not wandb.run and wandb.setup().settings.mode in ("online", "shared") and not wandb.login(prompt=False):
            raise InputError(
                "report_to wandb has no login: run wandb login, or set WANDB_MODE=offline, which keeps everything in "
                "the run folder."
            )


def _is_installed(name: str) -> bool:
    spec = importlib.util.find_spec(name)
    return spec is not None and spec.origin is not None  # a folder wandb/ or mlflow/ is a package without an origin


def arguments(config: TrainConfig) -> dict[str, Any]:
    """Return what a trainer is told of loggers."""
    return {"report_to": config.loggers or "none"}


@contextlib.contextmanager
def reporting(trainer: Any, config: TrainConfig, step: int, note: Callable[[str], None]) -> Iterator[None]:
    """Have the trainer's loggers be ready for a run that goes on from ``step``, and end them as the run ends.

    Args:
        trainer: of the run, with its ``run_id``.
        config: its options.
        step: that was made last; 0 for a run that begins.
        note: is told under which name the run is found.

    Raises:
        InputError: a logger cannot be begun, and why.
    """
    if not config.loggers:
        yield
        return
    trainer.args.run_name = f"{config.output.name}-{(trainer.run_id or '')[:ID_SHOWN]}".rstrip("-")
    ends: list[Callable[[str], None]] = []
    ended = "FINISHED"
    # trackio prints to where results are printed
    with contextlib.redirect_stdout(sys.stderr) if "trackio" in config.loggers else contextlib.nullcontext():
        try:
            with distributed.agreed_errors():
                for callback in trainer.callback_handler.callbacks if distributed.is_first() else ():
                    for kind, begin in BEGIN.items():
                        if isinstance(callback, kind):
                            ends.append(_begun(begin, trainer, callback, config, step))
            if others := [name for name in config.loggers if name != "tensorboard"]:
                note(f"Reporting to {', '.join(others)} as {trainer.args.run_name}")
            yield
        except BaseException as error:
            ended = "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"
            raise
        finally:
            for end in ends:
                end(ended)


def _begun(begin: Any, trainer: Any, callback: Any, config: TrainConfig, step: int) -> Callable[[str], None]:
    try:
        end: Callable[[str], None] = begin(trainer, callback, config, step)
    except Exception as error:  # of the logger's own kinds: no server, no right to write there, a name it does not take
        name = type(callback).__name__.removesuffix("Callback").lower()
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise InputError(f"report_to {name} cannot begin ({reason}): mend that, or leave {name} out.") from error
    return end


def _tensorboard(trainer: Any, callback: Any, config: TrainConfig, step: int) -> Callable[[str], None]:
    place = os.environ.get("TENSORBOARD_LOGGING_DIR") or str(RunFolder(config.output).tensorboard)
    callback.logging_dir = os.path.expanduser(place)
    if step:
        library = importlib.import_module("torch.utils.tensorboard" if _is_installed("tensorboard") else "tensorboardX")
        callback.tb_writer = library.SummaryWriter(callback.logging_dir, purge_step=step + 1)
    return lambda _: callback.on_train_end(trainer.args, trainer.state, trainer.control)


def _trackio(trainer: Any, callback: Any, config: TrainConfig, step: int) -> Callable[[str], None]:
    callback.setup(trainer.args, trainer.state, trainer.model)  # goes on with a run of this name
    return lambda _: callback.on_train_end(trainer.args, trainer.state, trainer.control)


def _wandb(trainer: Any, callback: Any, config: TrainConfig, step: int) -> Callable[[str], None]:
    import wandb

    is_ours = wandb.run is None  # or else a script's, which ends it
    if is_ours:
        wandb.init(
            project=os.environ.get("WANDB_PROJECT", "huggingface"),
            name=trainer.args.run_name,
            id=os.environ.get("WANDB_RUN_ID") or trainer.run_id,
            resume="allow" if wandb.setup().settings.mode in ("online", "shared") else None,
            dir=os.environ.get("WANDB_DIR") or config.output,
            settings=wandb.Settings(console="off"),  # the lines of a display that is drawn anew
        )
    callback.setup(trainer.args, trainer.state, trainer.model)
    codes = {"FINISHED": 0, "KILLED": INTERRUPTED, "FAILED": 1}
    return lambda ended: wandb.finish(codes[ended]) if is_ours else None


def _mlflow(trainer: Any, callback: Any, config: TrainConfig, step: int) -> Callable[[str], None]:
    import mlflow

    is_ours = mlflow.active_run() is None
    known: Any = []
    if is_ours:
        tag = {"halfbyte.run": trainer.run_id or trainer.args.run_name}
        if not os.environ.get("MLFLOW_RUN_ID"):
            words = " and ".join(f"tags.`{name}` = '{value}'" for name, value in tag.items())
            known = mlflow.search_runs(search_all_experiments=True, filter_string=words, output_format="list")
        name = trainer.args.run_name
        mlflow.start_run(run_id=known[0].info.run_id) if known else mlflow.start_run(run_name=name, tags=tag)
    with _environment(MLFLOW_MAX_LOG_PARAMS="0") if known else contextlib.nullcontext():  # a parameter never changes
        callback.setup(trainer.args, trainer.state, trainer.model)
    return lambda ended: mlflow.end_run(ended) if is_ours else None


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


BEGIN: dict[Any, Callable[[Any, Any, TrainConfig, int], Callable[[str], None]]] = {
    TensorBoardCallback: _tensorboard,
    TrackioCallback: _trackio,
    WandbCallback: _wandb,
    MLflowCallback: _mlflow,
}
"""What begins each logger, and returns what ends it."""
