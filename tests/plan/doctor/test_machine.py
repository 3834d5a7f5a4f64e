"""Processors, memory and disks: each finding from what the system really says, or from files as it writes them."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from halfbyte.plan.doctor import limits, machine, storage

V2 = "0::/user/run\n"
V1 = "4:cpu,cpuacct:/docker/abc\n7:memory:/docker/abc\n0::/\n"


def groups(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("membership", "files", "quota"),
    [
        (V2, {"user/run/cpu.max": "150000 100000\n", "user/cpu.max": "max 100000\n"}, 1.5),
        (V2, {"user/run/cpu.max": "400000 100000\n", "user/cpu.max": "100000 100000\n"}, 1.0),
        (V2, {"user/run/cpu.max": "max 100000\n"}, None),
        (V1, {"cpu/docker/abc/cpu.cfs_quota_us": "200000\n", "cpu/docker/abc/cpu.cfs_period_us": "100000\n"}, 2.0),
        (V1, {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        (V2, {"user/run/cpu.max": "nonsense"}, None),
        ("", {}, None),
    ],
)
def test_a_container_s_quota_is_the_least_of_its_groups(membership, files, quota, tmp_path: Path):
    assert limits.cpu_quota(membership, groups(tmp_path, files)) == quota


def test_processes_that_were_killed_for_memory_are_counted(tmp_path: Path):
    assert limits.out_of_memory_kills(V2, groups(tmp_path, {"user/run/memory.events": "oom 3\noom_kill 2\n"})) == 2
    v1 = groups(tmp_path, {"memory/docker/abc/memory.oom_control": "under_oom 0\noom_kill 1\n"})
    assert limits.out_of_memory_kills(V1, v1) == 1
    assert limits.out_of_memory_kills(V2, tmp_path / "nowhere") == 0
    assert [finding.level for finding in machine.kills(2)] == ["note"]
    assert list(machine.kills(0)) == []


@pytest.mark.parametrize(
    ("used", "quota", "environment", "level", "fix"),
    [
        (8, None, {}, "ok", ""),
        (1, None, {"OMP_NUM_THREADS": "1"}, "warning", "unset OMP_NUM_THREADS"),
        (8, 2.0, {}, "warning", "export OMP_NUM_THREADS=2"),
        (8, 0.5, {}, "warning", "export OMP_NUM_THREADS=1"),
        (2, 2.0, {"OMP_NUM_THREADS": "2"}, "ok", ""),
        (16, None, {"OMP_NUM_THREADS": "16"}, "warning", "export OMP_NUM_THREADS=8"),
    ],
)
def test_threads_are_held_against_cores_and_the_quota(used, quota, environment, level, fix):
    [finding] = machine.threads(used, 8, quota, 16, environment)
    assert finding.level == level and finding.fix.startswith(fix)
    assert finding.value.startswith(f"{used} of 8 cores")


def test_fewer_processors_than_cores_count_too():
    [finding] = machine.threads(8, 8, None, 4, {})
    assert (finding.level, finding.fix) == ("warning", "export OMP_NUM_THREADS=4")
    *_, waiting = machine.threads(4, 8, None, 4, {"OMP_WAIT_POLICY": "ACTIVE"})
    assert waiting.what == "waiting threads"


def test_threads_held_back_by_the_environment_are_told_with_what_to_do():
    script = "from halfbyte.plan.doctor import kernels; print(*(f for f in kernels.found() if f['what'] == 'threads'))"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    told = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert "'value': '1 of" in told.stdout
    assert ("unset OMP_NUM_THREADS" in told.stdout) == ("1 of 1 cores" not in told.stdout)


def test_memory_is_what_the_container_allows():
    assert next(machine.memory(2**30)).level == "warning"
    assert "1.00 GiB allowed to this container" in next(machine.memory(2**30)).value
    assert "allowed" not in next(machine.memory(None)).value
    assert [finding.level for finding in machine.swap(2**33, 2**34)] == ["warning"]
    assert list(machine.swap(2**20, 2**34)) == []


def test_a_limit_of_the_shell_is_seen():
    script = "from halfbyte.plan.doctor import machine; print(*machine.shell_limits())"
    limit = (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (2**35, resource.getrlimit(resource.RLIMIT_AS)[1]));"
    )
    told = subprocess.run([sys.executable, "-c", limit + script], capture_output=True, text=True, check=True)
    assert "ulimit -v allows 32.0 GiB" in told.stdout
    if resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY:
        assert not [one for one in machine.shell_limits() if "-v" in one.value]


def test_settings_of_the_system_are_read(tmp_path: Path):
    file = tmp_path / "setting"
    file.write_text("always madvise [never]\n")
    assert [finding.what for finding in machine.huge_pages(file)] == ["huge pages"]
    file.write_text("always [madvise] never\n")
    assert list(machine.huge_pages(file)) == []
    file.write_text("powersave\n")
    assert [finding.what for finding in machine.governor(file)] == ["governor"]
    assert list(machine.governor(tmp_path / "none")) == []
    assert [finding.what for finding in machine.load(9.0, 2)] == ["load"]
    assert list(machine.load(1.0, 2)) == []


def test_room_is_that_of_the_folder_that_will_hold_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "not" / "there" / "yet"
    free = storage.shutil.disk_usage(tmp_path).free
    [finding] = storage.room("cache", folder)
    assert finding.level == ("ok" if free >= storage.LITTLE_LEFT else finding.level)
    assert not folder.exists()
    for limit, level in ((storage.LITTLE_LEFT, "warning"), (storage.NONE_LEFT, "fault")):
        monkeypatch.setattr(storage.shutil, "disk_usage", lambda _, free=limit - 1: type("Usage", (), {"free": free}))
        [finding] = storage.room("cache", folder)
        assert finding.level == level and finding.fix
    monkeypatch.setattr(storage.os, "access", lambda *_: False)
    [finding] = storage.room("cache", folder, hint="; HF_HOME moves it")
    assert "cannot be written to" in finding.value and "HF_HOME" in finding.fix


def test_downloads_that_were_broken_off_are_told(tmp_path: Path):
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / "0123").write_bytes(b"x" * 100)
    assert [finding.what for finding in storage.cache(tmp_path)] == ["model cache"]
    (blobs / "4567.incomplete").write_bytes(b"x" * 50)
    [held, parts] = storage.cache(tmp_path)
    assert "150 B" in held.value and "1 file of 50 B" in parts.value


def test_the_disk_s_speed_is_read_from_a_file_and_nothing_is_written(tmp_path: Path):
    file = tmp_path / "large"
    file.write_bytes(os.urandom(storage.LARGE))
    assert storage.largest_file(tmp_path) == file
    before = sorted((one, one.stat().st_mtime_ns) for one in tmp_path.rglob("*"))
    rate = storage.read_speed(file)
    assert rate is None or rate > 0  # a file system in memory has no such way
    assert sorted((one, one.stat().st_mtime_ns) for one in tmp_path.rglob("*")) == before
    (tmp_path / "small").write_bytes(b"x")
    assert storage.largest_file(tmp_path / "nowhere") is None


def test_a_slow_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "large").write_bytes(bytes(storage.LARGE))
    for rate, level in ((20e6, "warning"), (900e6, "ok")):
        monkeypatch.setattr(storage, "read_speed", lambda _, rate=rate: rate)
        assert [finding.level for finding in storage.speed(tmp_path)] == [level]


def test_temporary_files_in_memory_are_told(tmp_path: Path):
    mounts = tmp_path / "mounts"
    mounts.write_text(f"/dev/sda1 / ext4 rw 0 0\ntmpfs {tmp_path} tmpfs rw 0 0\n")
    assert storage.filesystem(tmp_path / "deeper", mounts.read_text()) == "tmpfs"
    assert [finding.what for finding in storage.temporary(tmp_path, mounts)] == ["temporary files"]
    mounts.write_text("/dev/sda1 / ext4 rw 0 0\n")
    assert list(storage.temporary(tmp_path, mounts)) == []


def test_the_hub_is_not_asked_where_that_is_switched_off(monkeypatch: pytest.MonkeyPatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    [finding] = storage.hub()
    assert (finding.level, finding.fix) == ("note", "unset HF_HUB_OFFLINE")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(storage, "reason_without", lambda *_: "the hub cannot be reached (no route)")
    [finding] = storage.hub()
    assert finding.level == "note" and "no route" in finding.value
