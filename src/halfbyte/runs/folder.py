"""The folder of a run: its layout, who may write to it, and what it takes to go on in it.

    config.yaml                   every option; written first
    run.json                      the version of this layout, and the circumstances in which the run began
    skipped.jsonl                 rows that were left out (skip_bad_rows), and why
    metrics.jsonl                 one line per event (``runs/events.py``), written as it happens
    checkpoints/step-000123/      while training; what ``resume`` goes on from (``hf/trainers/state.py``)
    adapter_model.safetensors     the result, a plain PEFT folder, with adapter_config.json and the tokenizer
    base_format.json              how the base was held, where that is not the default
    config.json                   of a classifier: the base model's configuration with the names of the classes
    loss.png
    report.html                   a page of all this to read and to send (``runs/report/``)
    summary.json                  what the run came to; written last, so a folder that has it holds a finished run

Whoever wants to see, continue, stop or compare a run does it through this class, also from another process.
"""

import contextlib
import datetime
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from halfbyte import files, locks
from halfbyte.choices import WATCHING
from halfbyte.errors import InputError, check_writable
from halfbyte.runs import launched
from halfbyte.runs.config import TrainConfig

if TYPE_CHECKING:
    from halfbyte.runs.circumstances import Circumstances

VERSION = 1
"""Of the layout; counted up when an older halfbyte could not go on in a newer one's folder."""


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

    def last_checkpoint(self) -> Path | None:
        """Return the latest checkpoint, if there is one."""
        return max(self.checkpoints.glob("step-*"), key=step_of, default=None)

    def check(self, config: TrainConfig) -> Path | None:
        """Look whether a run with ``config`` may write here, and return the checkpoint that it goes on from, if any.

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
            return None
        if not config.resume:
            raise InputError(f"{path} already holds a run; set resume or overwrite, or name another folder.")
        if self.finished:
            raise InputError(f"{path} holds a finished run; set overwrite, or name another folder.")
        self._read_about()
        before = TrainConfig.from_yaml(self.config, {"output": path})
        watched = ["eval_steps", "save_steps"] if config.lr_scheduler_type in WATCHING else []
        for name in [*TrainConfig.fixed_options(), *watched]:
            old, new = getattr(before, name), getattr(config, name)
            if old != new:
                raise InputError(
                    f"{path} was begun with {name} {old!r} and cannot go on with {new!r}; "
                    f"use its own config.yaml, or name another folder."
                )
        return self.last_checkpoint()

    def compare(self, now: "Circumstances") -> list[str]:
        """Return what is other than when the run began and may change bits of its result.

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
        found = changes(before, now)
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
    ) -> None:
        """Remove what an earlier run left and begin this one; a model that the folder does not belong to stays.

        Args:
            config: the options.
            circumstances: in which it begins.
            skipped: a file that lists the rows that are left out.
            packed_tokens: the most that a packed pass may hold; None for padded batches.
            rows_a_pass: the batch size, which ``auto`` does not say.
        """
        # a configuration beside run.json is that of a classifier's adapter
        pages = [self.curve, self.report]
        for file in [*([self.model_config] if self.about.exists() else []), *self._own_files, *pages]:
            file.unlink(missing_ok=True)
        shutil.rmtree(self.checkpoints, ignore_errors=True)
        about = {"version": VERSION, "circumstances": circumstances.model_dump(), "packed_tokens": packed_tokens}
        about["rows_a_pass"] = rows_a_pass
        about["job"] = launched.job()
        about["begun"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        files.write_text(self.about, json.dumps(about, indent=2) + "\n")
        if skipped:
            with files.whole_file(self.skipped) as part:
                shutil.copyfile(skipped, part)
        config.save(self.config)

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
                f"{self.path} holds a run of halfbyte 0.1.0, from before run folders had versions, which cannot be "
                "resumed; set overwrite, or name another folder."
            ) from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{self.about} cannot be read ({error}); set overwrite, or name another folder."
            ) from error
        if version > VERSION:
            raise InputError(f"{self.path} holds a run of a newer halfbyte (layout {version}); go on with that one.")
        return about


def step_of(checkpoint: Path) -> int:
    """Return the steps that were done when ``checkpoint`` was saved."""
    return int(checkpoint.name.removeprefix("step-"))
