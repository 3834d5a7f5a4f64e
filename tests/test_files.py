"""Whole files, folders and lines, whichever call fails and whenever the writer is killed; locks; the full disk.

The calls of a writer are found by counting them, so that none is missed. Run as a script, this file kills writers.
"""

import contextlib
import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from halfbyte import locks, parts
from halfbyte.files import (
    append,
    disk_full,
    growing_folder,
    read_lines,
    remove_folder,
    repair,
    repair_within,
    scratch,
    unwritable,
    whole_file,
    whole_folder,
    write_text,
)
from halfbyte.locks import Lock, Locked, lock

READS = ("open", "close", "read", "pread", "stat", "lstat", "fstat", "listdir", "scandir")
WRITES = ("write", "pwrite", "fsync", "ftruncate", "mkdir", "rmdir", "rename", "replace", "unlink")
CALLS = [*((os, name) for name in READS + WRITES), (fcntl, "flock"), (parts, "exchange")]


@contextlib.contextmanager
def watched(act: Callable[[int, str, str], None]) -> Iterator[list[str]]:
    """Yield the names of the system calls as they are made; call ``act(n, name, "before" or "after")`` at each.

    No sync is made: only a power failure would show it.
    """
    names: list[str] = []

    def watch(real: Any, name: str) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            n = len(names)
            names.append(name)
            try:
                act(n, name, "before")
            except OSError:
                if name == "close":  # a close that fails closes all the same
                    real(*args)
                raise
            try:
                result = None if name == "fsync" else real(*args, **options)
            except OSError:
                act(n, name, "after")
                raise
            try:
                act(n, name, "after")
            except BaseException:
                if name == "scandir":
                    result.close()
                raise
            return result

        return call

    real = [getattr(module, name) for module, name in CALLS]
    for (module, name), function in zip(CALLS, real, strict=True):
        setattr(module, name, watch(function, name))
    try:
        yield names
    finally:
        for (module, name), function in zip(CALLS, real, strict=True):
            setattr(module, name, function)


def put(path: Path, data: bytes) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT)
    try:
        os.write(handle, data[:1])
        os.write(handle, data[1:])
    finally:
        os.close(handle)


def write_file(path: Path, data: bytes) -> None:
    with whole_file(path) as part:
        put(part, data)


def write_folder(path: Path, data: bytes) -> None:
    with whole_folder(path) as part:
        put(part / "first", data)
        os.makedirs(part / "in" / "deep")
        put(part / "in" / "deep" / "second", data)


def write_line(path: Path, data: bytes) -> None:
    append(path, data.decode())


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def grow(path: Path, data: bytes, key: str = "key") -> dict[str, bytes]:
    """Write a folder that grows, in which nothing is made twice; return what was in it."""
    with growing_folder(path, key) as part:
        found = content(part)
        for name in ("first", "second"):
            if name not in found:
                write_file(part / name, data)
    return found


@dataclass(frozen=True)
class Case:
    write: Callable[[Path, bytes], Any]
    replaced: bool
    exchange: bool = True
    place: str = "."

    @contextlib.contextmanager
    def prepared(self, folder: Path) -> Iterator[Path]:
        """Yield the target in ``folder``, with its old content."""
        target = folder / self.place / "name"
        if self.replaced:
            with watched(lambda n, name, when: None):  # so without syncs
                self.write(target, b"old")
        real = parts.exchange
        if not self.exchange:
            parts.exchange = lambda one, other: False
        try:
            yield target
        finally:
            parts.exchange = real

    @property
    def old(self) -> Any:
        if self.replaced:
            return self.result(b"old")
        return [] if self.write is write_line else None

    @property
    def new(self) -> Any:
        return [*self.old, "new"] if self.write is write_line else self.result(b"new")

    def result(self, data: bytes) -> Any:
        if self.write is write_folder:
            return {"first": data, "in/deep/second": data}
        if self.write is grow:
            return {"first": data, "second": data}
        return data if self.write is write_file else [data.decode()]

    def found(self, target: Path) -> Any:
        """Return what the target holds, None if it is not there: for lines that is as good as none."""
        if self.write is write_line:
            return read_lines(target) if target.exists() else []
        if not target.exists():
            return None
        if self.write is write_file:
            return target.read_bytes()
        return content(target)


CASES = {
    "new file": Case(write_file, replaced=False, place="in/new/folders"),
    "replaced file": Case(write_file, replaced=True),
    "new folder": Case(write_folder, replaced=False, place="in/new/folders"),
    "replaced folder": Case(write_folder, replaced=True),
    "replaced folder, no exchange": Case(write_folder, replaced=True, exchange=False),
    "first line": Case(write_line, replaced=False),
    "second line": Case(write_line, replaced=True),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())

GROWING = {
    "new": Case(grow, replaced=False, place="in/new/folders"),
    "replaced": Case(grow, replaced=True),
    "replaced, no exchange": Case(grow, replaced=True, exchange=False),
}
ALL = CASES | {f"growing, {name}": case for name, case in GROWING.items()}
each_growing = pytest.mark.parametrize("case", GROWING.values(), ids=GROWING.keys())


def leftovers(target: Path) -> list[str]:
    return [name for name in os.listdir(target.parent) if name != target.name] if target.parent.exists() else []


def point_of_no_return(names: list[str]) -> int:
    """Return the number of the call after which the new content stands: the last rename, or that before the last."""
    swaps = [n for n, name in enumerate(names) if name in ("rename", "replace", "exchange")]
    return max(swaps, default=len(names) - 2)


def calls_of(case: Case, folder: Path) -> list[str]:
    with case.prepared(folder) as target, watched(lambda n, name, when: None) as names:
        case.write(target, b"new")
    assert case.found(target) == case.new
    assert leftovers(target) == []
    return names


@pytest.mark.parametrize("case", ALL.values(), ids=ALL.keys())
def test_whichever_call_fails_the_old_content_stays_until_the_new_is_there(case: Case, tmp_path: Path) -> None:
    names = calls_of(case, tmp_path / "all")
    swap = point_of_no_return(names)
    failed = 0
    for n in range(len(names)):

        def fail(call: int, name: str, when: str, n: int = n) -> None:
            if (call, when) == (n, "before"):
                raise OSError(errno.EIO, os.strerror(errno.EIO))

        with case.prepared(tmp_path / str(n)) as target, watched(fail):
            try:
                case.write(target, b"new")
            except OSError:
                failed += 1
                assert case.found(target) == (case.old if n <= swap else case.new), (n, names[n])
                assert target.exists() == (case.replaced or n > swap), (n, names[n])
                assert leftovers(target) == [], (n, names[n])
            else:
                assert case.found(target) == case.new, (n, names[n])
            repair(target)
        assert leftovers(target) == [], (n, names[n])
    assert failed > 5


@each_case
@pytest.mark.parametrize("when", ["before", "after"])
def test_whenever_an_interrupt_comes_the_old_or_the_new_content_is_there(case: Case, when: str, tmp_path: Path) -> None:
    names = calls_of(case, tmp_path / "all")
    swap = point_of_no_return(names)
    for n in range(len(names)):

        def interrupt(call: int, name: str, at: str, n: int = n) -> None:
            if (call, at) == (n, when) and (name, at) != ("close", "after"):  # rmtree would close once more
                raise KeyboardInterrupt

        with case.prepared(tmp_path / str(n)) as target, watched(interrupt):
            try:
                case.write(target, b"new")
            except KeyboardInterrupt:
                expected = [case.old] * (n <= swap) + [case.new] * (n >= swap)
            else:
                expected = [case.new]
            assert case.found(target) in expected, (n, names[n])
        repair(target)
        assert leftovers(target) == [], (n, names[n])


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_interrupt_while_a_scratch_folder_is_removed_leaves_nothing_of_it(when: str, tmp_path: Path) -> None:
    target = tmp_path / "in" / "name"
    removing: list[int] = []

    def work() -> None:
        with scratch(target) as folder:
            put(folder / "first", b"data")
            os.makedirs(folder / "in" / "deep")
            put(folder / "in" / "deep" / "second", b"data")
            removing.append(len(names))

    with watched(lambda n, name, when: None) as names:
        work()
    whole, interrupted = len(names), 0
    for n in range(removing[0], whole):

        def interrupt(call: int, name: str, at: str, n: int = n) -> None:
            if (call, at) == (n, when) and (name, at) != ("close", "after"):  # rmtree would close once more
                raise KeyboardInterrupt

        with watched(interrupt) as names:
            try:
                work()
            except KeyboardInterrupt:
                interrupted += 1
        assert leftovers(target) == [], (n, names[n])
    assert interrupted > 5


@each_case
def test_when_nothing_works_any_more_the_next_start_repairs(case: Case, tmp_path: Path) -> None:
    names = calls_of(case, tmp_path / "all")
    for n in range(len(names)):

        def fail(call: int, name: str, when: str, n: int = n) -> None:
            if call >= n:
                raise OSError(errno.EIO, os.strerror(errno.EIO))

        with case.prepared(tmp_path / str(n)) as target, watched(fail), contextlib.suppress(OSError):
            case.write(target, b"new")
        repair(target)
        assert case.found(target) in (case.old, case.new), (n, names[n])
        assert leftovers(target) == [], (n, names[n])


def test_a_folder_that_is_removed_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    case = Case(write_folder, replaced=True)
    with case.prepared(tmp_path / "all") as target, watched(lambda n, name, when: None) as names:
        remove_folder(target)
    assert (case.found(target), leftovers(target)) == (None, [])
    seen = set()
    for n in range(len(names)):

        def fail(call: int, name: str, when: str, n: int = n) -> None:
            if call >= n:
                raise OSError(errno.EIO, os.strerror(errno.EIO))

        with case.prepared(tmp_path / str(n)) as target, watched(fail), contextlib.suppress(OSError):
            remove_folder(target)
        assert case.found(target) in (case.old, None), (n, names[n])
        seen.add(target.exists())
        repair(target)
        assert case.found(target) in (case.old, None), (n, names[n])
        assert leftovers(target) == [], (n, names[n])
    assert seen == {True, False}


@each_case
def test_a_repair_in_the_middle_of_a_living_writer_does_it_no_harm(case: Case, tmp_path: Path) -> None:
    names = calls_of(case, tmp_path / "all")
    for n in range(len(names)):
        with case.prepared(tmp_path / str(n)) as target:

            def interfere(call: int, name: str, when: str, n: int = n, target: Path = target) -> None:
                if (call, when) == (n, "after"):
                    repair(target)

            with watched(interfere):
                case.write(target, b"new")
            assert case.found(target) == case.new, (n, names[n])
            assert leftovers(target) == [], (n, names[n])


@each_case
def test_after_a_kill_at_any_call_the_next_start_finds_the_old_or_the_new_content(case: Case, tmp_path: Path) -> None:
    assert kills_of(case, tmp_path) > 20


def kills_of(case: Case, folder: Path) -> int:
    """Kill writers in another process, which can do so without harm to threads; return how many."""
    [name] = [name for name, other in ALL.items() if other is case]
    result = subprocess.run([sys.executable, __file__, name, str(folder)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return int(result.stdout)


def killed(case: Case, target: Path, n: int, when: str) -> bool:
    """Kill a writer at its call ``n``; return whether it made so many."""
    child = os.fork()
    if child == 0:

        def kill(call: int, name: str, at: str) -> None:
            if (call, at) == (n, when):
                os.kill(os.getpid(), signal.SIGKILL)

        with watched(kill):
            case.write(target, b"new")
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL)
    return code != 0


def kill_everywhere(case: Case, folder: Path) -> int:
    """Kill a writer at each of its calls, then repair, or write again; return the number of kills."""
    kills = 0
    for when in ("before", "after"):
        for again in (False, True):
            n = 0
            while True:
                with case.prepared(folder / f"{when} {again} {n}") as target:
                    if not killed(case, target, n, when):
                        break
                    if case.exchange:
                        assert case.found(target) in (case.old, case.new), (n, when)
                    if again:
                        case.write(target, b"new")
                        expected = [case.new, [*case.new, "new"]] if case.write is write_line else [case.new]
                        assert case.found(target) in expected, (n, when)
                    else:
                        repair(target)
                        assert case.found(target) in (case.old, case.new), (n, when)
                    assert leftovers(target) == [], (n, when)
                n += 1
            kills += n
    return kills


def whole_before(names: list[str], n: int, when: str) -> int | None:
    """Return how many files were whole when a writer that grows was stopped at call ``n``; None: it had all of them."""
    if n >= names.index("rename"):
        return None
    return names[: n + (when == "after")].count("replace")


@each_growing
@pytest.mark.parametrize("when", ["before", "after"])
def test_who_is_interrupted_leaves_what_has_grown_and_who_goes_on_finds_it(
    case: Case, when: str, tmp_path: Path
) -> None:
    names = calls_of(case, tmp_path / "all")
    swap = point_of_no_return(names)
    for n in range(len(names)):

        def interrupt(call: int, name: str, at: str, n: int = n) -> None:
            if (call, at) == (n, when) and (name, at) != ("close", "after"):  # rmtree would close once more
                raise KeyboardInterrupt

        with case.prepared(tmp_path / str(n)) as target:
            with watched(interrupt):
                try:
                    case.write(target, b"new")
                except KeyboardInterrupt:
                    expected = [case.old] * (n <= swap) + [case.new] * (n >= swap)
                else:
                    expected = [case.new]
            assert case.found(target) in expected, (n, names[n])
            repair(target)
            assert case.found(target) in expected, (n, names[n])
            is_done = case.found(target) == case.new
            found = grow(target, b"new")
            assert found.items() <= case.new.items()
            whole = whole_before(names, n, when)
            if whole is not None and not is_done and (names[n], when) != ("close", "after"):
                assert len(found) == whole, (n, names[n])
            assert case.found(target) == case.new
            assert leftovers(target) == [], (n, names[n])
            assert set(os.listdir(target)) == {"first", "second"}, (n, names[n])


@each_growing
def test_when_nothing_works_any_more_another_key_removes_what_has_grown(case: Case, tmp_path: Path) -> None:
    names = calls_of(case, tmp_path / "all")
    for n in range(len(names)):

        def fail(call: int, name: str, when: str, n: int = n) -> None:
            if call >= n:
                raise OSError(errno.EIO, os.strerror(errno.EIO))

        with case.prepared(tmp_path / str(n)) as target:
            with watched(fail), contextlib.suppress(OSError):
                case.write(target, b"new")
            repair(target)
            assert case.found(target) in (case.old, case.new), (n, names[n])
            assert grow(target, b"newer", "another key") == {}
            assert case.found(target) == case.result(b"newer"), (n, names[n])
            assert leftovers(target) == [], (n, names[n])


@each_growing
def test_after_a_kill_at_any_call_the_next_one_goes_on(case: Case, tmp_path: Path) -> None:
    assert kills_of(case, tmp_path) > 200


def kill_growing(case: Case, folder: Path) -> int:
    """Kill a writer that grows at each of its calls, then repair, go on, or write another; return the kills."""
    names = calls_of(case, folder / "all")
    kills = 0
    for then in ("repair", "go on", "another key"):
        n = 0
        while True:
            with case.prepared(folder / f"{then} {n}") as target:
                if not killed(case, target, n, "before"):  # that is after the call before
                    break
                is_done = case.found(target) == case.new
                if case.exchange:
                    assert is_done or case.found(target) == case.old, n
                if then == "repair":
                    repair(target)
                    assert case.found(target) in (case.old, case.new), n
                    left = leftovers(target)
                    for name in left:
                        grown = content(target.parent / name / target.name)
                        assert {n: x for n, x in grown.items() if n[0] != "."}.items() <= case.new.items(), n
                    repair(target)
                    assert leftovers(target) == left, n
                found = grow(target, b"new", "another key" if then == "another key" else "key")
                whole = whole_before(names, n, "before")
                if then == "another key":
                    assert found == {}, n
                elif whole is not None and not is_done:
                    assert len(found) == whole, (n, names[n])
                assert found.items() <= case.new.items(), n
                assert case.found(target) == case.new, n
                assert leftovers(target) == [], n
                assert set(os.listdir(target)) == {"first", "second"}, n
            n += 1
        kills += n
    return kills


@each_growing
def test_a_writer_with_another_key_and_a_repair_do_a_living_one_no_harm(case: Case, tmp_path: Path) -> None:
    names = calls_of(case, tmp_path / "all")
    for n in range(len(names)):
        with case.prepared(tmp_path / str(n)) as target:

            def interfere(call: int, name: str, when: str, n: int = n, target: Path = target) -> None:
                if (call, when) == (n, "after"):
                    repair(target)
                    with contextlib.suppress(ZeroDivisionError), growing_folder(target, "another key") as part:
                        (part / "half").touch()
                        raise ZeroDivisionError

            with watched(interfere):
                case.write(target, b"new")
            assert case.found(target) == case.new, (n, names[n])
            assert leftovers(target) == [], (n, names[n])


def test_an_error_removes_what_has_grown_also_what_was_found(tmp_path: Path) -> None:
    target = tmp_path / "name"
    for error in (KeyboardInterrupt, SystemExit, GeneratorExit):
        with pytest.raises(error), growing_folder(target, "key") as part:
            write_text(part / error.__name__, "whole")
            raise error
    [left] = leftovers(target)
    assert len(content(tmp_path / left / "name")) == 3
    with pytest.raises(ZeroDivisionError), growing_folder(target, "key") as part:
        assert len(content(part)) == 3
        raise ZeroDivisionError
    assert tree(tmp_path) == []
    with pytest.raises(KeyboardInterrupt), growing_folder(target, "key"):
        raise KeyboardInterrupt  # before anything has grown
    assert tree(tmp_path) == []
    target.write_bytes(b"a file")
    with pytest.raises(NotADirectoryError), growing_folder(target, "key"):
        pass
    assert tree(tmp_path) == ["name"]


def test_two_do_not_write_with_one_key(tmp_path: Path) -> None:
    target = tmp_path / "name"
    hold = (
        "with growing_folder(Path(sys.argv[1]), 'key') as part:\n"
        "    write_text(part / 'first', 'theirs')\n"
        "    print('first', flush=True)\n"
        "    time.sleep(60)"
    )
    with running(hold, target) as (process, said):
        assert said == "first"
        with pytest.raises(Locked, match="locked by another process"), growing_folder(target, "key"):
            pass
        assert grow(target, b"new", "another key") == {}
        assert content(target) == {"first": b"new", "second": b"new"}
        process.kill()
        process.wait()
        assert grow(target, b"newer") == {"first": b"theirs"}
    assert content(target) == {"first": b"theirs", "second": b"newer"}
    assert leftovers(target) == []


def test_who_finds_the_lock_in_a_repair_s_hands_waits_for_it(tmp_path: Path) -> None:
    target = tmp_path / "name"
    with pytest.raises(KeyboardInterrupt), growing_folder(target, "key") as part:
        write_text(part / "first", "whole")
        raise KeyboardInterrupt
    held = locks.take(part.parent / "name.lock")
    assert held
    timer = threading.Timer(0.1, held._close)
    timer.start()
    assert grow(target, b"new") == {"first": b"whole"}
    timer.join()


def test_folders_of_longer_names_and_of_others_are_left_alone(tmp_path: Path) -> None:
    digest = uuid.uuid4().hex
    longer = tmp_path / f".name.more.{digest}.grown"
    longer.mkdir()  # as it is before its writer has locked it
    theirs = tmp_path / f".name.{digest}.grown"
    (theirs / "name").mkdir(parents=True)
    (theirs / "notes").touch()
    (tmp_path / ".name.grown").mkdir()
    grow(tmp_path / "name", b"new")
    repair(tmp_path / "name")
    assert longer.is_dir() and (theirs / "notes").exists() and (tmp_path / ".name.grown").is_dir()


def test_what_a_dead_writer_of_a_file_within_left_goes_too(tmp_path: Path) -> None:
    target = tmp_path / "name"
    with pytest.raises(KeyboardInterrupt), growing_folder(target, "key") as part:
        write_text(part / "first", "whole")
        dead_part(part / "first")  # killed after the file was in its place
        raise KeyboardInterrupt
    assert grow(target, b"new") == {"first": b"whole"}
    assert set(os.listdir(target)) == {"first", "second"}


@pytest.mark.parametrize("write", [write_folder, grow])
@pytest.mark.parametrize("exchange", [True, False])
def test_all_at_any_depth_is_on_the_disk_before_the_swap_and_the_swap_before_the_old_folder_goes(
    exchange: bool, write: Callable[[Path, bytes], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[tuple[str, Any]] = []

    def note(patch: pytest.MonkeyPatch, module: Any, name: str, what: Callable[..., Any]) -> None:
        real = getattr(module, name)

        def call(*args: Any, **options: Any) -> Any:
            events.append((name, what(*args)))
            return real(*args, **options)

        patch.setattr(module, name, call)

    case = Case(write, replaced=True, exchange=exchange)
    with case.prepared(tmp_path) as target, monkeypatch.context() as patch:
        note(patch, os, "fsync", lambda handle: os.fstat(handle).st_ino)
        note(patch, os, "rename", lambda *names: None)
        note(patch, parts, "exchange", lambda *names: None)
        note(patch, os, "rmdir", lambda *names: None)
        case.write(target, b"new")
    inodes = {path.stat().st_ino for path in [target, *target.rglob("*")]}
    kinds = [kind for kind, _ in events]
    swap = max(n for n, kind in enumerate(kinds) if kind in ("rename", "exchange"))
    assert inodes == {inode for kind, inode in events[: kinds.index("exchange")] if kind == "fsync"}
    assert events[swap + 1] == ("fsync", tmp_path.stat().st_ino)
    begin = kinds.index("exchange") if write is grow else 0  # files within come into their places before
    assert "rmdir" not in kinds[begin : swap + 1]


def test_an_error_of_the_writer_leaves_what_was_there(tmp_path: Path) -> None:
    for name, case in CASES.items():
        if case.write is write_line:
            continue
        with case.prepared(tmp_path / name) as target:
            whole = whole_folder if case.write is write_folder else whole_file
            with pytest.raises(ZeroDivisionError), whole(target) as part:
                put(part / "half" if part.is_dir() else part, b"half")
                raise ZeroDivisionError
            assert case.found(target) == case.old
            assert leftovers(target) == []


def test_an_old_folder_that_cannot_be_removed_is_no_error_and_goes_next_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "name"
    write_folder(target, b"old")
    with monkeypatch.context() as patch:
        patch.setattr(parts.shutil, "rmtree", lambda path: os.rmdir(path))
        write_folder(target, b"new")
        assert (target / "first").read_bytes() == b"new"
        assert len(leftovers(target)) == 1
        write_text(target.with_name("other"), "nothing of the folder's")
        assert len(leftovers(target)) == 2
    write_folder(target, b"newer")
    assert leftovers(target) == ["other"]


def test_a_file_is_not_replaced_by_a_folder_nor_a_folder_by_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "folder").mkdir()
    with pytest.raises(NotADirectoryError):
        write_folder(tmp_path / "file", b"new")
    with pytest.raises(IsADirectoryError):
        write_file(tmp_path / "folder", b"new")
    assert (tmp_path / "file").read_bytes() == b"old"
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


@pytest.mark.parametrize("case", [CASES["replaced file"], CASES["replaced folder"]], ids=["file", "folder"])
def test_what_a_link_points_to_is_replaced(case: Case, tmp_path: Path) -> None:
    link = tmp_path / "link"
    with case.prepared(tmp_path / "elsewhere") as target:
        link.symlink_to(target)
        case.write(link, b"new")
    assert link.is_symlink()
    assert case.found(target) == case.new
    assert leftovers(link) == ["elsewhere"]


def test_a_writer_may_put_another_file_in_the_place_of_its_own(tmp_path: Path) -> None:
    write_text(tmp_path / "made elsewhere", "new")
    with whole_file(tmp_path / "name.txt") as part:
        assert part.name == "name.txt"
        part.touch()
        os.replace(tmp_path / "made elsewhere", part)
        repair(tmp_path / "name.txt")
    assert (tmp_path / "name.txt").read_text() == "new"
    assert leftovers(tmp_path / "name.txt") == []


def test_two_names_are_swapped_in_one_step_where_the_system_can(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "c").touch()
    if not parts.exchange(tmp_path / "a", tmp_path / "c"):
        pytest.skip("no exchange of names here")
    assert (tmp_path / "c" / "b").is_dir()
    assert (tmp_path / "a").is_file()
    assert not parts.exchange(tmp_path / "c", tmp_path / "c" / "b")  # EINVAL, as from file systems without it
    with pytest.raises(FileNotFoundError):
        parts.exchange(tmp_path / "a", tmp_path / "d")


def dead_part(target: Path, *, swapped: bool = False) -> Path:
    """Make what a writer leaves that was killed while writing, or between the renames of a swap."""
    part = target.with_name(f".{target.name}.{uuid.uuid4().hex}.part")
    (part / target.name).mkdir(parents=True)
    (part / target.name / "half").touch()
    (part / f"{target.name}.lock").touch()
    if swapped:
        os.rename(target, part / f"{target.name}.old")
    return part


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_repair_touches_nothing_but_dead_writers_parts_of_its_target(tmp_path: Path) -> None:
    target = tmp_path / "name"
    number = uuid.uuid4().hex
    for name in [".name.part", f".name.{number}.part", f".name.{number[1:]}.part", f"name.{number}.part"]:
        (tmp_path / "files" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "files" / name).touch()
    with_notes, no_lock = dead_part(target), dead_part(target)
    (with_notes / "notes").touch()
    (no_lock / "name.lock").unlink()
    (tmp_path / f".name.{number}.part").symlink_to(dead_part(tmp_path / "elsewhere" / "name"))
    others = [dead_part(tmp_path / other) for other in ("other", "nam", "name.name", "x.name")]
    with whole_folder(target) as alive:
        (alive / "half").touch()
        before = tree(tmp_path)
        dead = [dead_part(target), dead_part(target)]
        repair(target)
        repair(tmp_path / "files" / "name")
        assert tree(tmp_path) == before
        repair_within(tmp_path)
        assert not any(part.exists() for part in others)
        assert alive.exists()
        assert with_notes.exists() and no_lock.exists()
    assert tree(target) == ["half"]
    assert not any(part.exists() for part in dead)
    repair(tmp_path / "missing" / "name")
    repair_within(tmp_path / "missing")


def test_an_old_folder_gets_its_name_back_unless_another_has_it(tmp_path: Path) -> None:
    target = tmp_path / "name"
    write_folder(target, b"old")
    dead_part(target, swapped=True)
    target.mkdir()  # empty, as a program makes it that does not know
    repair(target)
    assert tree(tmp_path) == tree_of_folder("name")
    part = dead_part(target, swapped=True)
    shutil.rmtree(part / "name")  # a power failure on a file system that forgot the second rename
    repair(target)
    assert tree(tmp_path) == tree_of_folder("name")
    part = dead_part(target, swapped=True)
    target.mkdir()
    (target / "theirs").touch()
    repair(target)
    assert tree(target) == ["theirs"]
    assert (part / "name.old" / "first").read_bytes() == b"old"


def tree_of_folder(name: str) -> list[str]:
    return sorted([name, *(f"{name}/{inside}" for inside in ("first", "in", "in/deep", "in/deep/second"))])


def test_lines_come_back_and_a_torn_one_is_left_out_and_then_replaced(tmp_path: Path) -> None:
    file = tmp_path / "lines"
    lines = ["", "one", "zwei\u2028und\r drei", '{"a": 1}']
    for n, line in enumerate(lines):
        append(file, line)
        assert read_lines(file) == lines[: n + 1]
    whole = file.read_bytes()
    for torn in (b"t", "é".encode()[:1], b"\0" * 9000):
        file.write_bytes(whole + torn)
        assert read_lines(file) == lines
        append(file, "next")
        assert read_lines(file) == [*lines, "next"]
        file.write_bytes(torn)
        assert read_lines(file) == []
        append(file, "first")
        assert file.read_bytes() == b"first\n"
    with pytest.raises(ValueError, match="more than one line"):
        append(file, "a\nb")
    with pytest.raises(FileNotFoundError):
        read_lines(tmp_path / "none")


def test_a_line_that_is_written_in_pieces_is_whole_or_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "lines"
    append(file, "one")
    left = 1000
    real = os.pwrite

    def pwrite(handle: int, data: bytes, at: int) -> int:
        nonlocal left
        if not left:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        left -= min(left, 3)
        return real(handle, data[:3], at)

    monkeypatch.setattr(os, "pwrite", pwrite)
    append(file, "a second line")
    left = 7
    with pytest.raises(OSError, match="No space"):
        append(file, "a third line")
    assert file.read_bytes() == b"one\na second line\n"


@contextlib.contextmanager
def running(script: str, *arguments: object) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run Python code in another process; yield the process and the first line that it prints; kill it at the end."""
    imports = (
        "import os, sys, time\nfrom pathlib import Path\nfrom halfbyte.files import *\nfrom halfbyte.locks import *\n"
    )
    command = [sys.executable, "-c", imports + script]
    with subprocess.Popen([*command, *map(str, arguments)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        try:
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()


HOLD = "held = lock(Path(sys.argv[1])); print(os.getpid(), flush=True)\n"


def test_a_lock_keeps_other_processes_out_until_it_is_released_or_its_process_killed(tmp_path: Path) -> None:
    file = tmp_path / "run" / "lock"
    with running(f"{HOLD}time.sleep(60)", file) as (process, pid):
        with pytest.raises(Locked, match=f"locked by process {process.pid}") as refused:
            lock(file)
        assert refused.value.pid == int(pid) == process.pid
        assert refused.value.path == file
        process.kill()
        process.wait()
        assert file.exists()
        with lock(file) as held:
            assert held.held and held.certain
            assert file.read_text() == f"{os.getpid()}\n"
    assert tree(tmp_path) == ["run"]
    with running(f"{HOLD}held.release(); print('released', flush=True); time.sleep(60)", file) as (process, _):
        assert process.stdout and process.stdout.readline() == "released\n"
        lock(file).release()


def test_the_same_process_is_refused_too_whatever_reads_the_file(tmp_path: Path) -> None:
    file = tmp_path / "lock"
    with lock(file) as held:
        for _ in range(2):
            with pytest.raises(Locked) as refused:
                lock(file)
            assert refused.value.pid == os.getpid()
            file.read_bytes()
        file.write_bytes(b"")
        with pytest.raises(Locked, match="another process"):
            lock(file)
    assert not held.held
    held.release()
    lock(file).release()
    assert not file.exists()


def test_a_lock_does_not_outlive_its_process_in_children(tmp_path: Path) -> None:
    file = tmp_path / "lock"
    children = (
        "import subprocess\n"
        "forked = os.fork() or (held.release() or time.sleep(60))\n"
        "started = subprocess.Popen(['sleep', '60'], close_fds=False, stdout=subprocess.DEVNULL).pid\n"
        "print(forked, started, flush=True)\n"
        "time.sleep(60)"
    )
    with running(f"{HOLD}{children}", file) as (process, _):
        assert process.stdout
        pids = [int(pid) for pid in process.stdout.readline().split()]
        try:
            with pytest.raises(Locked):
                lock(file)
            process.kill()
            process.wait()
            until = time.monotonic() + 20
            while True:
                try:
                    lock(file).release()
                    break
                except Locked:  # the forked child has not come to close it
                    assert time.monotonic() < until
                    time.sleep(0.01)
            for pid in pids:
                os.kill(pid, 0)
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGKILL)


def test_a_forked_child_that_leaves_the_block_takes_nothing_away(tmp_path: Path) -> None:
    fork = (
        "with whole_folder(Path(sys.argv[1])) as part:\n"
        "    (part / 'file').touch()\n"
        "    child = os.fork()\n"
        "    if child == 0: sys.exit(3)\n"
        "    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3\n"
        "print('done')"
    )
    with running(fork, tmp_path / "name") as (_, said):
        assert said == "done"
    assert tree(tmp_path) == ["name", "name/file"]


def test_a_writer_in_another_process_is_left_alone_until_it_is_dead(tmp_path: Path) -> None:
    hold = (
        "from pathlib import Path\nwith whole_file(Path(sys.argv[1])) as part: print(part, flush=True); time.sleep(60)"
    )
    target = tmp_path / "name"
    with running(hold, target) as (process, part):
        write_text(target, "mine")
        assert Path(part).parent.is_dir()
        process.kill()
        process.wait()
        repair(target)
    assert tree(tmp_path) == ["name"]


def test_a_writer_whose_folder_a_repair_is_about_to_remove_takes_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[Lock] = []
    real = os.mkdir

    def mkdir(path: Path, mode: int = 0o777) -> None:
        real(path, mode)
        if not taken:
            other = locks.take(Path(path) / "name.lock")
            assert other
            taken.append(other)

    monkeypatch.setattr(os, "mkdir", mkdir)
    with whole_file(tmp_path / "name") as part:
        assert part.parent != taken[0].path.parent
        part.touch()
    taken[0].release()
    assert tree(tmp_path) == ["name"]


def test_writers_and_repairs_of_one_file_at_the_same_time_do_not_meet(tmp_path: Path) -> None:
    script = (
        "os.fsync = lambda handle: None\n"
        "first = all(os.fork() for _ in range(2))\n"
        "for n in range(150):\n"
        "    write_text(Path(sys.argv[1]), str(os.getpid()) * 9)\n"
        "    repair_within(Path(sys.argv[1]).parent)\n"
        "if first: print([os.wait()[1] for _ in range(2)])"
    )
    with running(script, tmp_path / "name") as (_, codes):
        assert codes == "[0, 0]"
    assert tree(tmp_path) == ["name"]


def test_releasing_leaves_a_file_that_is_another_lock(tmp_path: Path) -> None:
    file = tmp_path / "lock"
    first = lock(file)
    file.unlink()
    with lock(file):
        first.release()
        with pytest.raises(Locked):
            lock(file)


@pytest.mark.parametrize("number", sorted(locks.NO_LOCKS))
def test_without_locks_all_works_but_nothing_is_removed(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(handle: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with lock(tmp_path / "lock") as one, lock(tmp_path / "lock") as other:
        assert not one.certain and not other.certain
    target = tmp_path / "name"
    write_folder(target, b"old")
    write_folder(target, b"new")
    assert tree(tmp_path) == tree_of_folder("name")
    part = dead_part(target, swapped=True)
    repair(target)
    assert (target / "first").read_bytes() == b"new"
    assert part.exists()


def test_another_error_of_a_lock_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(handle: int, operation: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError, match="Input/output"):
        lock(tmp_path / "lock")


@pytest.mark.parametrize("number", sorted(parts.NO_SYNC))
def test_folders_that_cannot_be_synced_are_no_error_but_files_are(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders_only = True
    real = os.fsync

    def fsync(handle: int) -> None:
        if not folders_only or os.path.isdir(handle):
            raise OSError(number, os.strerror(number))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    write_folder(tmp_path / "name", b"new")
    folders_only = False
    with pytest.raises(OSError):
        write_folder(tmp_path / "name", b"newer")
    assert (tmp_path / "name" / "first").read_bytes() == b"new"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_or_quota_is_recognised_by_number_and_in_the_text_of_safetensors(number: int) -> None:
    assert disk_full(OSError(number, os.strerror(number), "file"))
    assert disk_full(Exception(f"{os.strerror(number)} (os error {number})"))  # as tokenizers says it
    assert disk_full(SafetensorError(f"Error while serializing: I/O error: {os.strerror(number)} (os error {number})"))


@pytest.mark.parametrize("error", [OSError(errno.EACCES, "no"), SafetensorError("(os error 2)"), ValueError("28")])
def test_no_other_error_is_taken_for_one(error: Exception) -> None:
    assert not disk_full(error)


def test_what_cannot_be_written_any_more_is_told_of_the_folder_alone(tmp_path: Path) -> None:
    for number in (errno.EACCES, errno.EROFS, errno.EIO):
        assert unwritable(PermissionError(number, "", str(tmp_path / "run/file")), tmp_path / "run")
        assert not unwritable(OSError(number, "", str(tmp_path / "data.jsonl")), tmp_path / "run")
        assert unwritable(SafetensorError(f"I/O error (os error {number})"), tmp_path / "run")
    assert not unwritable(OSError(errno.ENOENT, "", str(tmp_path / "run/file")), tmp_path / "run")
    assert not unwritable(ValueError("what else"), tmp_path)


if __name__ == "__main__":
    os.fsync = lambda handle: None
    kill_all = kill_growing if sys.argv[1].startswith("growing") else kill_everywhere
    sys.stdout.write(str(kill_all(ALL[sys.argv[1]], Path(sys.argv[2]))))
