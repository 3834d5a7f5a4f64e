"""The folder of a run: its layout, who may write to it, and what it takes to go on in it.

    config.yaml                   every option; with it a run has begun
    run.json                      the version of this layout, the run's id, its options, the circumstances in which it
                                  began, digests of what it is made from, and where it was given more steps
    skipped.jsonl                 rows that were left out (skip_bad_rows), and why
    metrics.jsonl                 one line per event (``runs/events.py``), written as it happens
    checkpoints/step-000123/      while training, and with ``keep`` after it; what ``resume`` goes on from, each with
                                  its checksums (``hf/trainers/state.py``)
    adapter_model.safetensors     the result, a plain PEFT folder, with adapter_config.json and the tokenizer
    base_format.json              how the base was held, where that is not the default
    base_fingerprint.json         which base it was: digests of its tensors (``hf/models/fingerprint.py``)
    config.json                   of a classifier: the base model's configuration with the names of the classes
    loss.png
    report.html                   a page of all this to read and to send (``runs/report/``)
    tensorboard/, wandb/          with report_to tensorboard or wandb
    evaluate/                     what ``halfbyte evaluate`` has measured, a folder each time
    summary.json                  what the run came to; written last, so a folder that has it holds a finished run

Whoever wants to see, continue, stop or compare a run does it through this class, also from another process.
"""

import contextlib
import datetime
import json
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from halfbyte import checksums, files, locks
from halfbyte.choices import WATCHING
from halfbyte.errors import InputError, check_writable
from halfbyte.runs import launched
from halfbyte.runs.config import TrainConfig

if TYPE_CHECKING:
    from halfbyte.runs.circumstances import Circumstances

VERSION = 1
"""Of the layout; counted up when an older halfbyte could not go on in a newer one's folder."""


OF_THE_BASE = ("base_format.json", "base_fingerprint.json")
OF_THE_CALL_LEFT = {"resume": False, "overwrite": False, "ray": None}
KEYS = {"version", "id", "job", "begun", "circumstances", "packed_tokens", "rows_a_pass"}
KEYS |= {"options", "inputs", "courses"}
"""Of run.json, beside the digest of them all, which older ones lack."""
INPUTS = {
    "data": "other training data",
    "eval_data": "other evaluation data",
    "tokenizer": "another tokenizer or chat template",
    "adapter": "another adapter to begin from",
}
"""What a run is made from beside the base model, as a sentence says that it is other."""


class RunFolder:
    """The folder of a run at ``path``, which need not be there yet."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.about = path / "run.json"
        self.metrics = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.adapter = path / "adapter_model.safetensors"
        self.adapter_config = path / "adapter_config.json"
        self.model_config = path / "config.json"
        self.skipped = path / "skipped.jsonl"
        self.curve = path / "loss.png"
        self.report = path / "report.html"
        self.tensorboard = path / "tensorboard"
        self.wandb = path / "wandb"
        self.evaluations = path / "evaluate"
        self.lock = path / ".lock"
        self.summary = path / "summary.json"

    @property
    def begun(self) -> bool:
        """Whether there is anything of a run in it."""
        return any(file.exists() for file in self._own_files)

    @property
    def finished(self) -> bool:
        """Whether it holds the results of a run."""
        return self.summary.exists()

    @property
    def _own_files(self) -> list[Path]:
        results = [self.adapter, self.adapter_config, self.summary]
        return [self.config, self.about, self.metrics, self.skipped, *results]

    def saved(self) -> list[Path]:
        """Return the checkpoints that are there, good or not, oldest first."""
        return checksums.saved(self.checkpoints)

    def checkpoint(self) -> tuple[Path | None, list[str]]:
        """Return the newest checkpoint that is whole and this run's, and what is wrong with those after it.

        Raises:
            InputError: there are some, and none is; or the run is finished and there are none.
        """
        found, damaged = checksums.newest_good(self.saved(), run=self._read_about().get("id"))
        if damaged and not found:
            raise InputError(checksums.none_is_good(self.path, damaged))
        if self.finished and not found:
            raise InputError(
                f"{self.path} holds a finished run, whose checkpoints were removed at its end, so it cannot be given "
                "more steps; train on from its adapter (adapter) in another folder, and set keep where runs may go on."
            )
        return found, damaged

    def check(self, config: TrainConfig) -> bool:
        """Look whether a run with ``config`` may write here, and return whether it goes on with the one that is there.

        Raises:
            InputError: it may not, and why.
        """
        path = self.path
        if path.exists() and not path.is_dir():
            raise InputError(f"{path} is a file; name a folder for the run.")
        if self.model_config.exists() and not self.about.exists():
            raise InputError(f"{path} holds a model; name another folder for the run.")
        check_writable(path)
        if config.overwrite or not self.begun:
            return False
        if not config.resume:
            raise InputError(f"{path} already holds a run; set resume or overwrite, or name another folder.")
        self._read_about()
        if not (self.config.exists() or self.finished or self.saved()):
            return False  # ended as it began
        self._check_options(config)
        return True

    def _options(self) -> TrainConfig:
        """Return the options that the run was begun with, or gone on with: not what config.yaml has been made since."""
        options = self._read_about().get("options")
        if options is None:
            return TrainConfig.from_yaml(self.config, {"output": self.path})
        try:
            return TrainConfig(**options | {"output": self.path} | OF_THE_CALL_LEFT)
        except (TypeError, ValueError):
            raise InputError(f"{self.about} is damaged; set overwrite, or name another folder.") from None

    def _check_options(self, config: TrainConfig) -> None:
        before = self._options()
        by_evaluations = config.lr_scheduler_type in WATCHING or config.keep_best or config.early_stopping_patience
        watched = ["eval_steps", "save_steps", "max_new_tokens"] if by_evaluations else []
        pairs = [(name, getattr(before, name), getattr(config, name)) for name in before.fixed_options() + watched]
        other = [f"{name}: {old!r} → {new!r}" for name, old, new in pairs if old != new]
        if other:
            raise InputError(
                f"{self.path} cannot go on with other options than it was begun with ({', '.join(other)}); use its own "
                "config.yaml (halfbyte resume does), or name another folder."
            )
        steps, passes = (before.max_steps, config.max_steps), (before.epochs, config.epochs)
        name, (old, new) = ("epochs", passes) if steps == (None, None) else ("max_steps", steps)
        if old and new and new < old:
            raise InputError(f"{self.path} can be given more {name}, not fewer ({old:g} → {new:g}).")
        if steps[0] and steps[0] == steps[1] and passes[0] != passes[1]:
            raise InputError(f"{self.path} goes by max_steps ({steps[0]}), not by epochs; give it more max_steps.")
        if self.finished and steps[0] == steps[1] and passes[0] == passes[1]:
            raise InputError(
                f"{self.path} holds a finished run; give it more max_steps or epochs, set overwrite, or name another "
                "folder."
            )

    def compare(self, now: "Circumstances", base_is_known: bool = False) -> list[str]:
        """Return what is other than when the run began and may change bits of its result.

        Args:
            now: the circumstances.
            base_is_known: whether all weights of the base were compared and are as they were.

        Raises:
            InputError: something is other that makes it another run.
        """
        from halfbyte.runs.circumstances import Circumstances, changes

        try:
            before = Circumstances.model_validate(self._read_about()["circumstances"])
        except (KeyError, ValidationError) as error:
            raise InputError(
                f"{self.about} does not say how the run began: it is damaged; begin another run."
            ) from error
        found = changes(before, now, base_is_known)
        if found.refused:
            raise InputError(
                f"{self.path} cannot be resumed as the same run: {' and '.join(found.refused)}. Put that back, or "
                "begin another run."
            )
        return found.noted

    def begin(
        self,
        config: TrainConfig,
        circumstances: "Circumstances",
        skipped: Path | None = None,
        packed_tokens: int | None = None,
        rows_a_pass: int | None = None,
        inputs: Mapping[str, str] | None = None,
    ) -> None:
        """Remove what an earlier run left and begin this one; a model that the folder does not belong to stays.

        Args:
            config: the options.
            circumstances: in which it begins.
            skipped: a file that lists the rows that are left out.
            packed_tokens: the most that a packed pass may hold; None for padded batches.
            rows_a_pass: the batch size, which ``auto`` does not say.
            inputs: digests of what it is made from, for :meth:`compare_inputs`.
        """
        of_a_run = self.about.exists()
        # a configuration beside run.json is that of a classifier's adapter
        beside = [self.curve, self.report, *(self.path / name for name in OF_THE_BASE)]
        for file in [*([self.model_config] if of_a_run else []), *self._own_files, *beside]:
            file.unlink(missing_ok=True)
        shutil.rmtree(self.checkpoints, ignore_errors=True)
        for folder in (self.tensorboard, self.wandb, *([self.evaluations] if of_a_run else [])):
            shutil.rmtree(folder, ignore_errors=True)
        about = {
            "version": VERSION,
            "id": uuid.uuid4().hex,
            "job": launched.job(),
            "begun": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "circumstances": circumstances.model_dump(),
            "packed_tokens": packed_tokens,
        }
        about |= {"rows_a_pass": rows_a_pass, "options": config.model_dump(mode="json")}
        about["inputs"] = dict(inputs or {})
        self._write_about(about)
        if skipped:
            with files.whole_file(self.skipped) as part:
                shutil.copyfile(skipped, part)
        config.save(self.config)

    def gets_more(self, config: TrainConfig) -> bool:
        """Return whether ``config`` has another end than the run that is there."""
        before = self._options()
        return (before.max_steps, before.epochs) != (config.max_steps, config.epochs)

    def saved_bytes(self) -> int:
        """Return what the checkpoints that are there take on the disk."""
        return sum(file.stat().st_size for folder in self.saved() for file in folder.rglob("*") if file.is_file())

    def compare_inputs(self, now: Mapping[str, str]) -> None:
        """Compare what the run is made from with what it was begun with, by digests.

        Raises:
            InputError: something is other, and what.
        """
        before = self._read_about().get("inputs") or {}
        names = [name for name in {**before, **now} if before and before.get(name) != now.get(name)]
        if names:
            told = (
                f"{INPUTS.get(name, name)} ({_short(before.get(name))} → {_short(now.get(name))})" for name in names
            )
            raise InputError(
                f"{self.path} was made with {' and '.join(told)}; put that back, or begin another run in another "
                "folder."
            )

    def go_on(self, config: TrainConfig, course: Mapping[str, int] | None = None) -> None:
        """Write down the options that the run goes on with, and if its end is another one, the ``course``."""
        if self._options() == config.model_copy(update=OF_THE_CALL_LEFT):
            return
        if course:
            self.summary.unlink(missing_ok=True)
        config.save(self.config)
        about = self._read_about()
        about["options"] = config.model_dump(mode="json")
        about["courses"] = [*about.get("courses", ()), *([dict(course)] if course else ())]
        self._write_about(about)

    def run_id(self) -> str | None:
        """Return what tells this run from others; None of an old one."""
        name: str | None = self._read_about().get("id")
        return name

    def packed_tokens(self) -> int | None:
        """Return what :meth:`begin` was told of packing."""
        tokens: int | None = self._read_about().get("packed_tokens")
        return tokens

    def rows_a_pass(self) -> int | None:
        """Return what :meth:`begin` was told of the batch size."""
        rows: int | None = self._read_about().get("rows_a_pass")
        return rows

    def processes(self) -> int:
        """Return how many processes began the run."""
        return int(self._read_about().get("circumstances", {}).get("processes", 1))

    def job(self) -> str | None:
        """Return which job of a launcher began the run (:func:`halfbyte.runs.launched.job`)."""
        job: str | None = self._read_about().get("job")
        return job

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for this process alone; made if it is not there, and removed again if nothing comes into it.

        What killed runs left half-written in it is removed.

        Raises:
            InputError: another process that is alive holds it.
        """
        made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            with locks.lock(self.lock):
                files.repair_within(self.path)
                files.repair_within(self.checkpoints)
                yield
        except locks.Locked as error:
            raise InputError(
                f"Another run (process {error.pid or 'unknown'}) writes to {self.path}; wait for it, stop it, or "
                "name another folder."
            ) from None
        finally:
            with contextlib.suppress(OSError):  # as soon as one is not empty
                for folder in made:
                    folder.rmdir()

    def _read_about(self) -> dict[str, Any]:
        try:
            about: dict[str, Any] = json.loads(self.about.read_text(encoding="utf-8"))
            version = int(about["version"])
        except FileNotFoundError:
            raise InputError(
                f"{self.path} has no run.json, so its run cannot be resumed (halfbyte 0.1.0 wrote none); put it back "
                "from a copy, set overwrite, or name another folder."
            ) from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{self.about} cannot be read ({error}); put it back from a copy, set overwrite, or name another "
                "folder."
            ) from error
        if version > VERSION:
            raise InputError(f"{self.path} holds a run of a newer halfbyte (layout {version}); go on with that one.")
        digest = about.pop("digest", None)
        if digest != checksums.digest_of(about) and not (digest is None and about.keys() <= KEYS):
            raise InputError(
                f"{self.about} is damaged, so nobody can say how the run began; put it back from a copy, set "
                "overwrite, or name another folder."
            )
        return about

    def _write_about(self, about: dict[str, Any]) -> None:
        about = json.loads(json.dumps(about))  # as it is read
        text = json.dumps(about | {"digest": checksums.digest_of(about)}, indent=2)
        files.write_text(self.about, text + "\n")


def _short(digest: str | None) -> str:
    return digest[:12] if digest else "none"
