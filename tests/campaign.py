"""A campaign against runs: random configurations, ended at random moments in every way, resumed, held to the whole run.

    python tests/campaign.py 1000               goes on with the trials that benchmarks/campaign.jsonl does not have yet
    python tests/campaign.py --seed 17          one trial again, told in full; nothing is written

A trial draws a configuration and an end from its seed. The run is ``halfbyte train`` in a process of its own, forked
from this one, which has imported the libraries and computed nothing. It is ended:

    kill          SIGKILL at a uniformly random time of the run
    save          SIGKILL before or after a random one of the system calls by which files and folders are written
    torn          SIGKILL within the writing of a file of tensors, of which a random part is there
    term, ctrl_c, twice     SIGTERM, Ctrl-C, and Ctrl-C twice within a second
    full          a small disk (tmpfs in a mount namespace of the trial's own), filled at a random time or before a
                  random system call, freed later
    read_only     the run folder loses its permission to be written (without root's right to do so all the same)
    clock         SIGKILL, and a clock (time.time) that jumps by weeks in both directions, before and after
    flip          SIGTERM or SIGKILL, then one random bit of a random file is turned: of the newest checkpoint, of those
                  beside it in the run folder, or of the cached table of tokens

Every tenth configuration is of two processes. Of them SIGKILL takes one, the launcher, both or all; SIGTERM one or the
launcher. In every fifth trial the tables of tokens and the shared base are made anew, in a cache of its own.

Then ``halfbyte resume`` goes on until the run is finished. What is held to hold: no traceback, ever; what metrics.jsonl
calls a checkpoint is there and whole; a damaged one is told with its file and the one before is taken, or where there
is none nothing is removed; at the end adapter, optimizer state, random state and metrics (but times) are byte for byte
those of the uninterrupted run, and nothing half-written is left.

A line of JSON a trial is appended to the results; the folder of one that failed is kept.
"""

import argparse
import contextlib
import ctypes
import functools
import gc
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "GOMP_SPINCOUNT"):
    os.environ[name] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import psutil  # noqa: E402
import torch  # noqa: E402

import campaign_processes  # noqa: E402
from conftest import save_task_model, save_tiny  # noqa: E402
from halfbyte import checksums  # noqa: E402
from halfbyte.errors import InputError  # noqa: E402
from halfbyte.runs.config import TrainConfig  # noqa: E402

RESULTS = Path(__file__).parents[1] / "benchmarks" / "campaign.jsonl"
ENDS = ("kill", "save", "torn", "term", "ctrl_c", "twice", "full", "read_only", "clock", "flip")
WEIGHTS = (5, 5, 2, 2, 2, 2, 3, 2, 2, 5)
CONFIGURATIONS = 60
"""Of the random ones, so many are drawn from; each is run without an end once."""
OWN_CACHE = 0.2
"""Share of the trials whose cache is empty."""
TIMEOUT = 180.0
CALLS = ("mkdir", "open", "pwrite", "ftruncate", "fsync", "rename", "replace", "unlink", "rmdir")
"""Of module ``os``: what files are written and removed by."""
WORDS = ["An apple", "The sea, mostly", "Four", "Five, if you insist", "Good day", "No", "A heron on Sunday", "Rome"]
TIMES = (
    "elapsed", "tokens_per_second", "seconds", "trained_tokens_per_second", "memory_bytes", "peak_memory_bytes",
    "foretold",
)  # fmt: skip


class Failed(Exception):
    """A trial has shown a fault."""


def nothing() -> None:
    """Do nothing."""


def rows_of(task: str, count: int = 13) -> list[dict[str, Any]]:
    """Rows of different lengths."""
    asked = [f"{'really ' * (i % 4)}{i}?" for i in range(count)]
    both = [(q, WORDS[i % 8]) for i, q in enumerate(asked)]
    if task in ("dpo", "orpo"):
        return [{"prompt": q, "chosen": a, "rejected": WORDS[(i + 3) % 8]} for i, (q, a) in enumerate(both)]
    if task == "kto":
        return [{"prompt": q, "completion": a, "label": i % 3 > 0} for i, (q, a) in enumerate(both)]
    if task == "classify":
        return [{"sentence": q, "label": ("owl", "dog", "fish")[i % 3]} for i, q in enumerate(asked)]
    if task == "seq2seq":
        return [{"text": q, "target": a} for q, a in both]
    if task == "closed":
        return [{"instruction": q, "output": ("yes", "no", "owl")[i % 3]} for i, q in enumerate(asked)]
    if task == "other":  # what no row that is trained on says
        return [{"instruction": q, "output": "~~~~ ~~~~"} for q in asked]
    return [{"instruction": q, "output": a} for q, a in both]


def make_place(place: Path) -> None:
    """Make the models and the data of all configurations."""
    save_tiny(place / "tiny")
    save_task_model("bert", place / "bert")
    save_task_model("t5", place / "t5")
    for task in ("sft", "closed", "dpo", "orpo", "kto", "classify", "seq2seq"):
        lines = "".join(json.dumps(row) + "\n" for row in rows_of(task))
        (place / f"{task}.jsonl").write_text(lines)
    for name, task, count in (("more", "sft", 7), ("other", "other", 4)):
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_of(task, count)))
    (place / "general.txt").write_text("A general text, of which there is not much.\n\n" * 8)


def draw_configuration(number: int, place: Path) -> dict[str, Any]:
    """Return the options of configuration ``number``."""
    draw = random.Random(f"configuration {number}")
    while True:
        task = draw.choice(["sft", "sft", "sft", "dpo", "kto", "orpo", "classify", "seq2seq"])
        is_lm = task not in ("classify", "seq2seq")
        model = {"classify": "bert", "seq2seq": "t5"}.get(task, "tiny")
        options: dict[str, Any] = {
            "model": str(place / model),
            "data": str(place / f"{task}.jsonl"),
            "preset": "quick",
            "method" if is_lm else "task": task,
            "rank": draw.choice([2, 8]),
            "learning_rate": 1e-2,
            "lr_scheduler_type": draw.choice(["linear", "cosine", "constant"]),
            "warmup_ratio": draw.choice([0.0, 0.2]),
            "batch_size": draw.choice([2, 3]),
            "gradient_accumulation_steps": draw.choice([1, 2, 3]),
            "group_by_length": draw.random() < 0.5,
            "optimizer": draw.choice(
                ["paged_adamw_8bit", "adamw_8bit", "paged_adamw_32bit", "adamw_torch", "lion_8bit", "adafactor"]
            ),
            "lora_dropout": draw.choice([0.0, 0.1]),
            "epochs": draw.choice([1.5, 2]),
            "save_steps": draw.choice([1, 2, 3]),
            "keep": draw.choice([2, 3]),
            "memory": "64GiB",  # not what is free
            "max_length": 96,
        }
        if task == "sft":
            options["packing"] = draw.choice([True, False])
            if draw.random() < 0.3:
                options |= {"neftune_noise_alpha": 5.0, "packing": None}
            if draw.random() < 0.4:
                options["data"] = [f"{options['data']}@{draw.choice([0.6, 1.7])}", f"{place / 'more.jsonl'}@0.5"]
            if draw.random() < 0.3:
                options["replay"] = f"{place / 'more.jsonl'}*{draw.choice([0.2, 0.4])}"
        options |= {} if task == "classify" else {"max_new_tokens": draw.choice([4, 16]), "eval_samples": 3}
        if is_lm:
            options |= draw.choice([{}, {"sample_prompts": []}, {"sample_prompts": ["why?", "who is it?"]}])
            if draw.random() < 0.25:
                options["forgetting_data"] = str(place / "general.txt")
        if draw.random() < 0.5:
            options |= {"eval_share": 0.3, "eval_steps": draw.choice([1, 2, 3]), "keep_best": draw.random() < 0.5}
            options |= draw_watching(draw, task, place)
        if draw.random() < 0.2:
            options["save_minutes"] = 0.002
        kind = draw.choice(["lora", "lora", "loraplus", "dora", "pissa"])
        options |= {"loraplus": {"loraplus_lr_ratio": 4.0}, "dora": {"use_dora": True}}.get(kind, {})
        if kind == "pissa":
            options |= {"init_lora_weights": "pissa", "lora_dropout": 0.0}
        if model == "tiny" and draw.random() < 0.3:
            options["modules_to_save"] = "embed_tokens"  # 8-bit state from 4096 values on
        if number % 10 == 9:
            options |= {"processes": 2, "batch_size": 2, "gradient_accumulation_steps": draw.choice([1, 1, 2])}
            options |= {"max_restarts": draw.choice([0, 2])}
        with contextlib.suppress(InputError):
            TrainConfig.from_yaml(None, options | {"output": "out"})
            return options


def draw_watching(draw: random.Random, task: str, place: Path) -> dict[str, Any]:
    """Return options of evaluations: references, a closed set of answers, early stopping."""
    options: dict[str, Any] = {}
    if task == "sft":
        options["eval_samples"] = draw.choice([0, 3, 8])
        if draw.random() < 0.3:
            options["data"] = str(place / "closed.jsonl")
        elif draw.random() < 0.4:
            options |= {"eval_share": None, "eval_data": str(place / "other.jsonl")}
    if draw.random() < 0.5:
        options |= {"early_stopping_patience": draw.choice([1, 2]), "eval_steps": 1, "epochs": 4, "keep_best": True}
        if task == "sft":
            options["metric_for_best"] = draw.choice(["loss", "loss", "token_accuracy"])
    return options


def fork(work: Callable[[], int | None], log: Path | None = None) -> int:
    """Do ``work`` in a child, whose two streams go to ``log``; return its process id."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell starts things behind it
        if log:
            handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        code = work() or 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def wait(child: int, timeout: float = TIMEOUT) -> int:
    """Return the exit code of ``child``, or minus the signal that ended it, when all of its processes have ended."""
    deadline = time.monotonic() + timeout
    code: int | None = None
    while time.monotonic() < deadline:
        try:
            done, status = os.waitpid(-1, os.WNOHANG)  # those that lost their launcher are ours now
        except ChildProcessError:
            assert code is not None
            return code
        if done == child:
            code = os.waitstatus_to_exitcode(status)
        if not done:
            time.sleep(0.005)
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            process.kill()
    with contextlib.suppress(ChildProcessError):
        while True:
            os.waitpid(-1, 0)
    raise Failed(f"a run took more than {timeout:.0f} s" if code is None else "a process outlived its launcher")


def adopt() -> None:
    """Become the parent of what this process's children leave behind when they end (Linux)."""
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER


def command_line(
    *words: str, before: Callable[[], None] = nothing, writer: Callable[[], None] = nothing, processes: int = 1
) -> Callable[[], None]:
    """Return what runs the command line ``halfbyte WORDS``, after ``before``, and in who writes after ``writer``."""

    def run() -> None:
        if campaign_processes.is_writer():
            writer()
        from halfbyte.cli import main

        main()

    def work() -> None:
        before()
        sys.argv = ["halfbyte", *words]
        if processes == 1:
            run()
            return
        campaign_processes.fork_workers(run)
        from halfbyte.cli import main

        main()

    return work


def counting(place: int | None, after: bool, report: Path, strike: Callable[[], None] = nothing) -> Callable[[], None]:
    """Count the calls of ``CALLS`` under a run, and ``strike`` at one of them, or write their number down."""

    def install() -> None:
        count, leave = 0, os._exit

        def wrapped(real: Any) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                nonlocal count
                count += 1
                at = count
                if at == place and not after:
                    strike()
                result = real(*args, **kwargs)
                if at == place and after:
                    strike()
                return result

            return call

        def tell(code: int) -> None:
            total = count
            if place is None:
                report.write_text(str(total))
            leave(code)

        for name in CALLS:
            setattr(os, name, wrapped(getattr(os, name)))
        os._exit = tell  # type: ignore[assignment]

    return install


def tearing(at: int, share: float) -> Callable[[], None]:
    """Kill the process within the writing of the file of tensors number ``at``, of which a ``share`` is there."""

    def install() -> None:
        import peft.peft_model
        import safetensors.torch

        import halfbyte.hf.trainers.checkpoints as ours

        count, real = 0, safetensors.torch.save_file

        def save_file(tensors: Any, name: Any, *args: Any, **kwargs: Any) -> None:
            nonlocal count
            count += 1
            real(tensors, name, *args, **kwargs)
            if count == at:
                os.truncate(name, int(share * os.path.getsize(name)))
                os.kill(os.getpid(), signal.SIGKILL)

        for module in (peft.peft_model, ours):
            module.save_file = module.safe_save_file = save_file  # type: ignore[attr-defined]

    return install


def fill(disk: Path) -> Callable[[], None]:
    """Leave no byte free on the disk at ``disk``; return what frees it again."""
    filler = disk / "filler"
    for size in (4096, 1):
        with contextlib.suppress(OSError), open(filler, "ab", buffering=0) as stream:
            while True:
                stream.write(bytes(size))
    return lambda: filler.unlink(missing_ok=True)


def jumping(seed: int) -> Callable[[], None]:
    """Let ``time.time`` jump by up to twenty days, at each call, in both directions."""

    def install() -> None:
        draw, real = random.Random(seed), time.time
        time.time = lambda: real() + draw.uniform(-2e6, 2e6)

    return install


def powerless() -> None:
    """Give up root's right to write where permissions forbid it."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
    data = (ctypes.c_uint32 * 6)()
    if libc.capget(header, data) == 0:
        for place in (0, 1):  # effective, permitted
            data[place] &= ~0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        libc.capset(header, data)


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[bool]:
    """Put a disk of ``size`` at ``folder`` for this process and its children; yield whether that can be done here."""
    libc = ctypes.CDLL(None, use_errno=True)
    new_mounts, private, recursive = 0x20000, 1 << 18, 1 << 14
    done = libc.unshare(new_mounts) == 0 and libc.mount(b"none", b"/", None, private | recursive, None) == 0
    done = done and libc.mount(b"none", os.fsencode(folder), b"tmpfs", 0, f"size={size}".encode()) == 0
    try:
        yield done
    finally:
        if done:
            libc.umount2(os.fsencode(folder), 2)


class Trial:
    """One run, its end, and its way to the end.

    Args:
        seed: of everything that is drawn.
        place: models, data, and the uninterrupted runs.
        folder: of the trial.
        configurations: of how many one is drawn.
    """

    def __init__(self, seed: int, place: Path, folder: Path, configurations: int = CONFIGURATIONS) -> None:
        self.draw = random.Random(f"trial {seed}")
        self.place = place
        self.folder = folder
        self.number = self.draw.randrange(configurations)
        self.options = draw_configuration(self.number, place)
        self.end = self.draw.choices(ENDS, WEIGHTS)[0]
        self.disk = folder / "disk"
        self.run = self.disk / "run"
        self.processes = self.options.get("processes", 1)
        self.log = folder / "log.txt"
        self.result: dict[str, Any] = {"seed": seed, "end": self.end, "configuration": self.number}

    def perform(self) -> None:
        """Do it.

        Raises:
            Failed: a fault was shown.
        """
        self.disk.mkdir(parents=True)
        whole = reference(self.number, self.options, self.place)
        about = json.loads((whole / "about.json").read_text())
        begun = time.monotonic()
        if self.draw.random() < OWN_CACHE:
            os.environ["HALFBYTE_CACHE"] = str((self.disk if self.end == "full" else self.folder) / "cache")
            self.result["own_cache"] = True
        if self.processes > 1:
            self.result["restarts"] = self.options["max_restarts"]
        if self.end == "full":
            with small_disk(self.disk, "64m") as there:
                if not there:
                    self.result["skipped"] = "no small disk to be had"
                    return
                self._perform(about)
                shutil.copytree(self.run, self.folder / "run")
            self.run = self.folder / "run"
        else:
            self._perform(about)
        self.result["seconds"] = round(time.monotonic() - begun, 1)
        other = self.result.get("told") == "the run went on, with what can be read"
        compare(self.run, whole / "run", tidy=not self.result.get("finished"), watched=not other)

    def _perform(self, about: dict[str, Any]) -> None:
        config = self.folder / "config.yaml"
        config.write_text(json.dumps(self.options | {"output": str(self.run)}))
        self._end_it(train_words(config), about)
        again = 1 if self.end != "flip" and self.draw.random() < 0.25 else 0
        for _ in range(again):
            if (self.run / "config.yaml").exists() and not (self.run / "summary.json").exists():
                self.result["again"] = True
                self._end_it(["resume", str(self.run)], about)
        hook = jumping(self.draw.randrange(99)) if self.end == "clock" else nothing
        # killed as it ended: nobody tidies up any more
        self.result |= {"finished": True} if (self.run / "summary.json").exists() else {}
        for _ in range(3):
            if (self.run / "summary.json").exists():
                return
            fresh = not (self.run / "config.yaml").exists()
            words = [*train_words(config), "--resume"] if fresh else ["resume", str(self.run)]
            code = wait(fork(command_line(*words, before=hook, processes=self.processes), self.log))
            self._no_traceback()
            if code:
                raise Failed(f"resuming ended with {code}: {self._last_line()}")
        if not (self.run / "summary.json").exists():
            raise Failed("the run does not come to its end")

    def _end_it(self, words: list[str], about: dict[str, Any]) -> None:
        """Begin ``halfbyte WORDS`` and end it."""
        moment, hook, writer = self.draw.uniform(0, 0.95 * about["seconds"]), nothing, nothing
        end, number = self.end, self.draw.randrange(99)
        if end == "flip":
            end = self.draw.choice(["term", "kill"])
        targets = campaign_processes.TARGETS
        target = self.draw.choice(targets if end in ("kill", "save", "clock") else ("launcher", "launcher", "one"))
        if self.processes > 1:
            self.result["target"] = [*self.result.get("target", ()), target]
        if end == "save":
            at = self.draw.randint(1, about["calls"])
            kill = functools.partial(campaign_processes.kill, target, number)
            writer = counting(at, self.draw.random() < 0.5, self.folder / "calls", kill)
        elif end == "full" and self.draw.random() < 0.5:
            at = self.draw.randint(1, about["calls"] // (3 if words[0] == "resume" else 1))
            writer = counting(at, False, self.folder / "calls", functools.partial(fill, self.disk))
            end = "full at a call"
        elif end == "torn":
            at = self.draw.randint(1, about["files"])
            writer = tearing(at, self.draw.random())
        elif end == "clock":
            hook = jumping(number)
        elif end == "read_only":
            hook = powerless
        begun = time.monotonic()
        child = fork(command_line(*words, before=hook, writer=writer, processes=self.processes), self.log)
        undo = nothing
        if end in ("save", "torn", "full at a call"):
            self.result["moment"] = at
        else:
            self.result["moment"] = round(moment, 2)
            self.result["alive"] = True
            while self.result["alive"] and time.monotonic() - begun < moment:
                time.sleep(0.002)
                self.result["alive"] = os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
            if not self.result["alive"] and words[0] == "train":  # the machine has become faster
                about["seconds"] = (about["seconds"] + time.monotonic() - begun) / 2
                (self.place / f"whole-{self.number}" / "about.json").write_text(json.dumps(about))
            steps = sum(event["kind"] == "step" for event in events(self.run))
            undo = self._strike(end, child, target, number)
        code = wait(child)
        undo()
        (self.disk / "filler").unlink(missing_ok=True)
        if code == 0 and self.result.get("alive") and end in ("term", "ctrl_c", "twice"):
            total = sum(event["kind"] == "step" for event in events(self.run))
            if steps < total - 2:
                raise Failed(f"{end} after {steps} of {total} steps was not heard")
        self.result["exit"] = [*self.result.get("exit", ()), code]
        self._no_traceback()
        allowed = {
            "kill": {-9}, "clock": {-9}, "save": {-9}, "torn": {-9},
            "full": {2}, "full at a call": {2}, "read_only": {2},
        }.get(end, {130, -2, -15}) | {0}  # fmt: skip
        if self.processes > 1 and end in ("kill", "save", "torn", "clock", "term"):
            # the launcher tells of one that was killed, unless it begins them again
            allowed |= set() if self.options["max_restarts"] and end != "term" else {2}
        if code not in allowed:
            raise Failed(f"{end}: exit code {code}: {self._last_line()}")
        self._hold_checkpoints()
        if self.end == "flip" and not (self.run / "summary.json").exists():
            self._flip()

    def _strike(self, end: str, child: int, target: str, number: int) -> Callable[[], None]:
        """Do to the run what ends it; return what undoes that."""
        if end in ("kill", "clock", "term", "ctrl_c", "twice"):
            numbers = {"term": signal.SIGTERM, "ctrl_c": signal.SIGINT, "twice": signal.SIGINT}
            hit = [child]
            if self.processes > 1 and end in ("kill", "clock", "term"):
                hit = campaign_processes.struck(target, child, number)
            for pid in hit:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, numbers.get(end, signal.SIGKILL))
            if end == "twice":
                time.sleep(self.draw.uniform(0, 1))
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGINT)
        elif end == "full":
            return fill(self.disk)
        elif end == "read_only":
            locked = [folder for folder in (self.run, self.run / "checkpoints", self.disk) if folder.is_dir()]
            before = [(folder, folder.stat().st_mode) for folder in locked]
            for folder in locked:
                folder.chmod(0o555)

            def undo() -> None:
                for folder, mode in before:
                    if folder.exists():
                        folder.chmod(mode)

            return undo
        return nothing

    def _hold_checkpoints(self) -> None:
        """Hold the checkpoints to be whole, and to be those that the metrics tell of."""
        good = [folder for folder in self._checkpoints() if is_good(folder)]
        others = [folder for folder in self._checkpoints() if folder not in good]
        newest = max((step_of(folder) for folder in good), default=0)
        if any(step_of(folder) >= newest for folder in others):
            raise Failed(f"{others[-1].name} is not whole, and nobody has damaged it")
        told = [event["step"] for event in events(self.run) if event["kind"] == "checkpoint"]
        if not (self.run / "summary.json").exists() and max(told, default=0) > newest:
            raise Failed(f"the checkpoint of step {max(told)} was told, and the newest good one is {newest}")

    def _flip_a_bit(self, file: Path) -> tuple[bytes, int, str]:
        """Turn a bit of ``file`` and resume; return what it was, the exit code and what was said."""
        whole = file.read_bytes()
        place, bit = self.draw.randrange(len(whole)), self.draw.randrange(8)
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
        self.result["flipped"] = [file.parent.name, file.name, place, bit]
        log = self.folder / "flipped.txt"
        code = wait(fork(command_line("resume", str(self.run), processes=self.processes), log))
        text = log.read_text()
        if "Traceback" in text:
            raise Failed(f"a traceback: {text}")
        return whole, code, text

    def _flip_beside(self) -> None:
        """Damage something beside the checkpoints: it is told, or the run is the whole one all the same."""
        files = [self.run / name for name in ("config.yaml", "run.json", "metrics.jsonl") if (self.run / name).exists()]
        if self.result.get("own_cache"):
            rows = (Path(os.environ["HALFBYTE_CACHE"]) / "rows").rglob("*")
            files += sorted(path for path in rows if path.is_file() and path.stat().st_size)
        if not files:
            return
        file, before = self.draw.choice(files), self._names()
        whole, code, text = self._flip_a_bit(file)
        if code == 2 and self._names() == before and "Error: " in text and text.count("Error: ") == 1:
            self.result["told"] = text[text.index("Error: ") :].strip().replace(str(self.folder), "TRIAL")
            file.write_bytes(whole)
        elif code:
            raise Failed(f"{file.name} is damaged: {code}, changed: {self._names() ^ before}: {text[-400:]}")
        elif file.name == "run.json":
            raise Failed("run.json is damaged, and the run went on")
        # what config.yaml may say otherwise is as its user wishes
        elif file.name == "config.yaml" or f"{file.name} is not as it was" in text:
            self.result["told"] = "the run went on, with what can be read"

    def _flip(self) -> None:
        """Damage the newest checkpoint, and hold what is said of that."""
        if self.draw.random() < 0.4:
            self._flip_beside()
            return
        there = self._checkpoints()
        if not there:
            return
        newest, before = there[-1], self._names()
        file = self.draw.choice(sorted(path for path in newest.rglob("*") if path.is_file() and path.stat().st_size))
        whole, code, text = self._flip_a_bit(file)
        name = file.relative_to(newest).as_posix()
        told = f"{newest.name}: {name} is damaged" in text or f"{newest.name}: a newer halfbyte" in text
        if not told:
            raise Failed(f"{newest.name}/{name} is damaged, and that is not told: {text[-400:]}")
        if len(there) > 1:
            if code or there[-2].name not in text:
                raise Failed(f"{there[-2].name} was not taken in the place of the damaged one ({code}): {text[-400:]}")
            self.result["told"] = "the one before was taken"
            return
        if code != 2 or self._names() != before:
            raise Failed(f"there is no good checkpoint: exit code {code}, changed: {self._names() ^ before}")
        self.result["told"] = "there is none before; nothing was removed"
        file.write_bytes(whole)

    def _names(self) -> set[str]:
        """What is in the run's folder, but for what killed processes have not finished."""
        names = {path.relative_to(self.run).as_posix() for path in self.run.rglob("*")}
        return {name for name in names if not any(part.startswith(".") for part in name.split("/"))}

    def _checkpoints(self) -> list[Path]:
        return sorted((self.run / "checkpoints").glob("step-*"), key=step_of)

    def _no_traceback(self) -> None:
        text = self.log.read_text() if self.log.exists() else ""
        if "Traceback" in text:
            raise Failed(f"a traceback: {text[text.index('Traceback') :][-2500:]}")

    def _last_line(self) -> str:
        return self.log.read_text().strip().rpartition("\n")[2]


def train_words(config: Path) -> list[str]:
    return ["train", "--config", str(config)]


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def is_good(folder: Path) -> bool:
    try:
        checksums.check(folder)
    except checksums.Damaged:
        return False
    return True


def events(run: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl."""
    file = run / "metrics.jsonl"
    text = file.read_text() if file.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def compare(run: Path, whole: Path, tidy: bool, watched: bool = True) -> None:
    """Hold a run to the uninterrupted one, and if it is to be ``tidy``, to having left nothing half-written.

    Not ``watched`` is what was told on the way: then the adapter alone has to be the same.

    Raises:
        Failed: something is other.
    """
    last = sorted((whole / "checkpoints").glob("step-*"), key=step_of)[-1].relative_to(whole)
    files = [Path("adapter_model.safetensors"), *(last / name for name in ("state.safetensors", "state.json"))]
    for file in [*files, last / "adapter_model.safetensors"]:
        if (run / file).read_bytes() != (whole / file).read_bytes():
            raise Failed(f"{file} is not that of the uninterrupted run")
        if not watched:
            return
    for kind in ("step", "evaluation", "sample"):
        ours, theirs = ([timeless(e) for e in events(folder) if e["kind"] == kind] for folder in (run, whole))
        if ours != theirs:
            raise Failed(f"the metrics ({kind}) are not those of the uninterrupted run")
    ours, theirs = (timeless(json.loads((folder / "summary.json").read_text())) for folder in (run, whole))
    if ours != theirs:
        raise Failed(f"the summary {ours} is not {theirs}")
    names, expected = ({p.relative_to(folder).as_posix() for p in folder.rglob("*")} for folder in (run, whole))
    names, expected = ({n for n in found if not n.startswith("checkpoints/")} for found in (names, expected))
    if not tidy:
        names = {name for name in names if not name.startswith(".")}
    if names != expected:
        raise Failed(f"the folder has other files: {sorted(names ^ expected)}")
    there = [p for p in (run / "checkpoints").iterdir() if tidy or not p.name.startswith(".")]
    if left := [p.name for p in there if not p.name.startswith("step-") or not is_good(p)]:
        raise Failed(f"left behind: {left}")


def timeless(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name not in TIMES}


def reference(number: int, options: dict[str, Any], place: Path) -> Path:
    """Return the folder of the uninterrupted run of a configuration, with the time and the calls that it took."""
    whole = place / f"whole-{number}"
    if (whole / "about.json").exists():
        return whole
    shutil.rmtree(whole, ignore_errors=True)
    whole.mkdir()
    config = whole / "config.yaml"
    config.write_text(json.dumps(options | {"output": str(whole / "run")}))
    calls, log = whole / "calls", whole / "log.txt"
    begun, processes = time.monotonic(), options.get("processes", 1)
    writer = counting(None, False, calls)
    code = wait(fork(command_line(*train_words(config), writer=writer, processes=processes), log))
    if code or "Traceback" in log.read_text():
        raise Failed(f"configuration {number} does not run: {log.read_text()[-3000:]}")
    seconds = time.monotonic() - begun
    saves = sum(event["kind"] == "checkpoint" for event in events(whole / "run"))
    about = {"seconds": seconds, "calls": int(calls.read_text()), "files": 2 * saves + 1}
    (whole / "about.json").write_text(json.dumps(about))
    return whole


def perform(seed: int, place: Path, folder: Path, configurations: int = CONFIGURATIONS) -> dict[str, Any]:
    """Perform a trial in a process of its own; return its line of the results."""
    report = folder / "result.json"

    def work() -> None:
        adopt()
        trial = Trial(seed, place, folder, configurations)
        try:
            trial.perform()
            trial.result["ok"] = True
        except Failed as error:
            trial.result |= {"ok": False, "failure": str(error)}
        report.write_text(json.dumps(trial.result))

    folder.mkdir(parents=True)
    child = fork(work, folder / "trial.txt")
    try:
        wait(child, 6 * TIMEOUT)
        result: dict[str, Any] = json.loads(report.read_text())
    except (Failed, FileNotFoundError) as error:
        text = (folder / "trial.txt").read_text() if (folder / "trial.txt").exists() else ""
        result = {"seed": seed, "ok": False, "failure": f"{error}: {text[-2000:]}"}
    return result


def done_seeds(results: Path) -> set[int]:
    """The trials whose lines are there."""
    text = results.read_text() if results.exists() else ""
    return {json.loads(line)["seed"] for line in text.splitlines()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", type=int, nargs="?", default=300, help="how many trials there are to be in all")
    parser.add_argument("--first", type=int, default=0, help="the seed of the first one")
    parser.add_argument("--seed", type=int, help="one trial again, with its folder kept")
    parser.add_argument("--configurations", type=int, default=CONFIGURATIONS, help="how many are drawn from")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--place", type=Path, help="a folder for all that is written, kept")
    given = parser.parse_args()
    place = (given.place or Path(tempfile.mkdtemp(prefix="campaign."))).absolute()
    place.mkdir(parents=True, exist_ok=True)
    os.environ["HALFBYTE_CACHE"] = str(place / "cache")
    if not (place / "made").exists() and wait(fork(lambda: make_place(place))) == 0:
        (place / "made").touch()
    load_libraries(place)
    if given.seed is not None:
        shutil.rmtree(place / f"trial-{given.seed}", ignore_errors=True)
        print(json.dumps(perform(given.seed, place, place / f"trial-{given.seed}"), indent=1))
        print(place / f"trial-{given.seed}")
        return 0
    failed = 0
    for seed in range(given.first, given.count):
        if seed in done_seeds(given.results):
            continue
        folder = place / f"trial-{seed}"
        shutil.rmtree(folder, ignore_errors=True)
        result = perform(seed, place, folder, given.configurations)
        with given.results.open("a") as stream:
            stream.write(json.dumps(result).replace(str(place), "PLACE") + "\n")
        print(json.dumps(result), flush=True)
        if result["ok"] or "skipped" in result:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            failed += 1
    print(f"{failed} of the new trials failed" + (f"; their folders are in {place}" if failed else ""))
    if not given.place and not failed:
        shutil.rmtree(place)
    return int(failed > 0)


def imported(number: int, place: Path) -> list[str]:
    """Return the names of the modules that a run of configuration ``number`` has imported at its end."""
    config, listed = place / "config.yaml", place / "imported.json"
    options = draw_configuration(number, place) | {"output": str(place / "first"), "overwrite": True}
    config.write_text(json.dumps(options))

    def run() -> None:
        try:
            command_line(*train_words(config), processes=options.get("processes", 1))()
        finally:
            listed.write_text(json.dumps([name for name in sys.modules if "." in name or name.isidentifier()]))

    if wait(fork(run, place / "first.txt")):
        raise Failed((place / "first.txt").read_text())
    names: list[str] = json.loads(listed.read_text())
    return [name for name in names if not name.startswith(("__main__", "conftest"))]


def load_libraries(place: Path) -> None:
    """Import what runs import, as one of them has listed it, and compute nothing: threads do not survive a fork."""
    torch.set_num_threads(1)
    listed = place / "modules.json"
    if not listed.exists():
        names: set[str] = set()
        for number in (*range(4), 9):  # 9: a launcher
            names |= set(imported(number, place))
        listed.write_text(json.dumps(sorted(names)))
    for name in json.loads(listed.read_text()):
        with contextlib.suppress(Exception), warnings.catch_warnings(action="ignore"):
            importlib.import_module(name)
    gc.freeze()


if __name__ == "__main__":
    sys.exit(main())
