"""What a user calls a task, and lm-eval's tasks that it means.

    arc_easy, mmlu, "mmlu_*"   lm-eval's own, their groups and tags, and patterns of these
    my_task.yaml               a task in lm-eval's YAML; Python functions that it names (``!function``) are run
    rows.jsonl                 a file of rows (:mod:`halfbyte.evaluate.tasks.rows`)

Data of lm-eval's own tasks lie on the hub, or in the cache when they were fetched before. The hub is asked once whether
it is there (:mod:`halfbyte.hub`); without it only the cache is looked into.
"""

import contextlib
import difflib
import functools
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tqdm
from lm_eval.api.group import Group
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.tasks import TaskManager

from halfbyte.data.hub import offline_if
from halfbyte.data.readers import kind_of
from halfbyte.errors import InputError, nearest
from halfbyte.evaluate.tasks.rows import task_of
from halfbyte.files import absolute
from halfbyte.hub import PATIENCE, first_line, reason_without

YAML = (".yaml", ".yml")
SEEDS = {"random": 0, "others": 1234}
"""lm-eval's own."""
LOCAL = ("json", "csv", "parquet", "arrow", "text", "pandas", "xml", "webdataset", "imagefolder", "audiofolder")
"""What ``datasets`` reads from files of this machine by such names."""

Loaded = dict[str, Any]
"""``tasks``, ``groups`` and ``group_map``, as lm-eval's evaluator takes them."""


def load(words: Sequence[str], *, shots: str | None = None, num_fewshot: int | None = None) -> Loaded:
    """Return the tasks that a user names.

    Args:
        words: names, patterns, files; with commas for several in one.
        shots: solved examples for the files of rows.
        num_fewshot: solved examples before each question; None: as each task has it.

    Raises:
        InputError: there is no such task, it cannot be loaded, or it cannot be asked here.
    """
    names = [name.strip() for word in words for name in word.split(",") if name.strip()]
    if not names:
        raise InputError("--tasks names no task; name one, such as arc_easy, or a file.")
    files = [name for name in names if _is_rows(name)]
    if shots is not None and not files:
        raise InputError(
            "--shots are solved examples for tasks that are files of rows; name such a file, or leave it out."
        )
    manager: TaskManager | None = None
    items: list[Any] = []
    for name in dict.fromkeys(names):
        path = absolute(name)
        if name in files:
            items.append(_made(name, functools.partial(_of_rows, name, shots), None))
        elif path.suffix in YAML and path.is_file():
            alone = TaskManager(include_defaults=False)
            items += _flat(_made(name, functools.partial(alone.load, [str(path)]), None))
        elif path.suffix in YAML or kind_of(path) is not None or path.exists():
            raise InputError(f"There is no file {name}{_near(path)} of a task; name one that is there.")
        else:
            manager = manager or TaskManager()
            for known in _known(name, manager):
                items += _flat(_loaded(known, manager))
    loaded: Loaded = TaskManager(include_defaults=False).load(items)
    for name, task in loaded["tasks"].items():
        _check(name, task)
        _set_shots(task, num_fewshot)
        _try(name, task)
    return loaded


def begin(loaded: Loaded) -> None:
    """Draw solved examples, and whatever a task draws, from here on as lm-eval does it from its beginning."""
    random.seed(SEEDS["random"])
    np.random.seed(SEEDS["others"])
    torch.manual_seed(SEEDS["others"])
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(seed=SEEDS["others"])


def _of_rows(name: str, shots: str | None) -> Task:
    return ConfigurableTask(config=task_of(name, shots))


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """Keep lm-eval's own bars away, which it draws whatever it is told."""
    before = tqdm.tqdm.__init__
    tqdm.tqdm.__init__ = functools.partialmethod(before, disable=True)
    try:
        yield
    finally:
        tqdm.tqdm.__init__ = before


def _is_rows(name: str) -> bool:
    path = absolute(name)
    return path.suffix not in YAML and path.is_file() and kind_of(path) is not None


def _near(path: Path) -> str:
    there = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    return nearest(path.name, there)


def _known(name: str, manager: TaskManager) -> list[str]:
    found: list[str] = manager.match_tasks([name])
    if not found:
        hint = nearest(name, manager.all_tasks)
        others = difflib.get_close_matches(name, manager.all_tasks, n=4, cutoff=0.6)[1:]
        more = f" There is also {', '.join(others)}." if others else ""
        raise InputError(f"lm-eval has no task {name!r}{hint}, and there is no such file.{more}")
    return found


def _flat(loaded: Loaded) -> list[Any]:
    """Return what was asked for: groups whole, and tasks that are in none of them."""
    groups: list[Group] = list(loaded["groups"].values())
    inner = {id(below) for group in groups for below in group.get_all_groups()}
    top = [group for group in groups if id(group) not in inner]
    inside = {id(task) for group in top for task in group.get_all_tasks()}
    return [*top, *(task for task in loaded["tasks"].values() if id(task) not in inside)]


def _loaded(name: str, manager: TaskManager) -> Loaded:
    """Load one of lm-eval's own tasks."""
    from huggingface_hub import is_offline_mode

    path = _data_of(name, manager)
    if path is None or path in LOCAL or Path(path).exists():
        loaded: Loaded = _made(name, lambda: manager.load([name]), None)
        return loaded
    reason: str | None = "the hub is not asked, since HF_HUB_OFFLINE is set"
    if not is_offline_mode():
        reason = reason_without(lambda api: api.dataset_info(path, timeout=PATIENCE), "data set")
    with offline_if(reason is not None):
        lacking = reason and f"its data ({path}) are not here, and {reason}"
        loaded = _made(name, lambda: manager.load([name]), lacking)
    return loaded


def _data_of(name: str, manager: TaskManager) -> str | None:
    """Return where the data of a task lie, or of the first one of a group or tag."""
    for _ in range(10):  # groups of groups
        entry = manager.task_index.get(name)
        if entry is None:
            return None
        config = entry.cfg or {}
        below = [*(config["task"] if isinstance(config.get("task"), list) else ()), *sorted(entry.tags or ())]
        if isinstance(config.get("dataset_path"), str):
            return str(config["dataset_path"])
        if not below or (isinstance(config.get("task"), str)):
            return None
        name = str(below[0].get("task", "") if isinstance(below[0], dict) else below[0])
    return None


def _made(name: str, make: Callable[[], Any], reason: str | None) -> Any:
    """Make a task, out of code and data that are not ours: whatever goes wrong there is told.

    Raises:
        InputError: something does.
    """
    try:
        return make()
    except InputError:
        raise
    except Exception as error:
        why = reason or f"{type(error).__name__}: {first_line(error)}"
        raise InputError(
            f"The task {name} cannot be loaded ({why}); name another one, or a file of your own (--tasks rows.jsonl)."
        ) from error


def _check(name: str, task: Task) -> None:
    if getattr(task, "UNSAFE_CODE", False):
        raise InputError(f"The task {name} runs code that the model writes, which is not done here; leave it out.")
    if getattr(task, "MULTIMODAL", False):
        raise InputError(f"The task {name} shows pictures or sounds, and the model reads text alone; leave it out.")


def _set_shots(task: Task, num_fewshot: int | None) -> None:
    """Set the number of solved examples as ``simple_evaluate`` does: never where a task wants none."""
    own = task.get_config("num_fewshot")
    if num_fewshot is not None and own != 0:
        task.set_config(key="num_fewshot", value=num_fewshot)
    elif own is None:
        task.set_config(key="num_fewshot", value=0)


def _try(name: str, task: Task) -> None:
    """Write a task's first question, before a model is opened.

    Raises:
        InputError: that fails.
    """
    task.set_fewshot_seed(seed=SEEDS["others"])
    try:
        with without_bars():
            task.build_all_requests(limit=1)
    except Exception as error:
        shots = task.get_config("num_fewshot")
        behind = f" behind {shots} solved ones" if shots else ""
        raise InputError(
            f"The task {name} cannot write its questions{behind} ({type(error).__name__}: {first_line(error)}); mend "
            "its configuration, or ask with another --num-fewshot."
        ) from error
