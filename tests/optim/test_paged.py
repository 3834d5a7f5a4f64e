"""Paged optimizer state: where it lies, that it changes nothing else, and what a full disk does."""

import copy
import io
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import Parameter

from halfbyte.errors import InputError
from halfbyte.optim import AdamW, paged

MIB = 2**20


@pytest.fixture
def disk() -> Iterator[Path]:
    """An empty folder on a disk; pytest's own may lie in memory."""
    with tempfile.TemporaryDirectory(dir=paged.choose_folder(None)) as folder:
        yield Path(folder).resolve()


def mappings(folder: Path) -> list[str]:
    """This process's mappings of files in ``folder`` that have no name."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return [line for line in lines if f" {folder}/" in line and line.endswith("(deleted)")]


def stepped(
    page_dir: Path | None, bits: int, dtype: torch.dtype = torch.float32, sizes: tuple[int, ...] = (5001, 9)
) -> AdamW:
    generator = torch.Generator().manual_seed(0)
    params = [Parameter(torch.randn(n, generator=generator).to(dtype)) for n in sizes]
    optimizer = AdamW(params, state_bits=bits, paged=page_dir is not None, page_dir=page_dir)
    for _ in range(4):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(dtype)
        optimizer.step()
    return optimizer


def tensors(optimizer: AdamW) -> list[torch.Tensor]:
    values = [value for p, state in optimizer.state.items() for value in (p.detach(), *state.values())]
    return [value for value in values if isinstance(value, torch.Tensor)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [32, 8])
def test_paged_training_is_bitwise_unpaged_training(bits: int, dtype: torch.dtype, disk: Path) -> None:
    sizes = (5001, 9, 4096, 0, 1)
    plain, mapped = tensors(stepped(None, bits, dtype, sizes)), tensors(stepped(disk, bits, dtype, sizes))
    assert all(torch.equal(a, b) for a, b in zip(plain, mapped, strict=True))


def test_without_posix_fallocate_zeros_reserve_the_disk(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "posix_fallocate")  # as on macOS
    size = 3 * MIB + 17
    with paged.reserve(disk, size) as mapped:
        assert mapped[:] == bytes(size)
        links = {link: os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()}
        (file,) = (link for link, target in links.items() if target.startswith(f"{disk}/"))
        assert file.stat().st_size == size and 512 * file.stat().st_blocks >= size
    for plain, own in zip(tensors(stepped(None, 8)), tensors(stepped(disk, 8)), strict=True):
        assert torch.equal(plain, own)


def test_the_state_of_many_tensors_is_one_unnamed_file_that_goes_with_the_optimizer(disk: Path) -> None:
    optimizer = stepped(disk, 8, sizes=(4096, 100) * 200)
    assert optimizer.page_dir == disk
    assert len(mappings(disk)) == 1
    assert list(disk.iterdir()) == []
    del optimizer
    assert mappings(disk) == []


def test_paged_state_takes_no_anonymous_memory(disk: Path) -> None:
    before = psutil.Process().memory_info()
    state = paged.zeros([(torch.float32, torch.Size([4 * MIB]))] * 2, disk)
    for tensor in state:
        tensor.fill_(1)
    after = psutil.Process().memory_info()
    assert after.shared - before.shared >= 32 * MIB
    assert (after.rss - after.shared) - (before.rss - before.shared) < MIB


def test_a_killed_process_leaves_nothing_behind(disk: Path) -> None:
    script = (
        "import os, signal, sys, torch; from pathlib import Path; from halfbyte.optim import AdamW\n"
        "p = torch.nn.Parameter(torch.ones(5000)); p.grad = torch.ones(5000)\n"
        "optimizer = AdamW([p], state_bits=8, paged=True, page_dir=sys.argv[1]); optimizer.step()\n"
        "assert sys.argv[1] in Path('/proc/self/maps').read_text()\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    result = subprocess.run([sys.executable, "-c", script, str(disk)])
    assert result.returncode == -signal.SIGKILL
    assert list(disk.iterdir()) == []


def test_loaded_state_is_paged_again(disk: Path) -> None:
    saved = stepped(None, 8).state_dict()
    optimizer = AdamW([Parameter(torch.zeros(n)) for n in (5001, 9)], state_bits=8, paged=True, page_dir=disk)
    optimizer.load_state_dict(saved)
    start, end = (int(x, 16) for x in mappings(disk)[0].split()[0].split("-"))
    loaded = optimizer.state_dict()["state"]
    for index, state in saved["state"].items():
        assert state["step"] == loaded[index]["step"] == 4
        for name in state.keys() - {"step"}:
            assert start <= loaded[index][name].data_ptr() < end
            assert torch.equal(loaded[index][name], state[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize(("page", "page_again"), [(False, True), (True, False), (True, True)])
def test_saved_state_goes_from_paged_to_unpaged_and_back(
    page: bool, page_again: bool, bits: int, dtype: torch.dtype, disk: Path
) -> None:
    sizes = (5001, 9, 0, 4096)
    optimizer = stepped(disk if page else None, bits, dtype, sizes)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    assert len(file.getvalue()) < 2.5 * sum(x.nbytes for x in tensors(optimizer)) + 20_000  # no tensor twice
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    by_name = {f"{i}.{k}": x for i, s in saved["state"].items() for k, x in s.items() if isinstance(x, torch.Tensor)}
    save_file(by_name, disk / "state.safetensors")

    params = [Parameter(p.detach().clone()) for group in optimizer.param_groups for p in group["params"]]
    other = AdamW(params, state_bits=bits, paged=page_again, page_dir=disk if page_again else None)
    other.load_state_dict(saved)
    for one in (optimizer, other):
        for p in one.param_groups[0]["params"]:
            p.grad = torch.ones_like(p)
        one.step()
    assert all(torch.equal(a, b) for a, b in zip(tensors(optimizer), tensors(other), strict=True))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))])  # noqa: S301
@pytest.mark.parametrize("page", [False, True])
def test_a_copied_optimizer_steps_like_the_original(page: bool, copied: Any, disk: Path) -> None:
    optimizer = stepped(disk if page else None, 8)
    other = copied(optimizer)
    assert (other.state_bits, other.page_dir) == (8, disk if page else None)
    assert len(mappings(disk)) == 2 * page
    for one in (optimizer, other):
        for p in one.param_groups[0]["params"]:
            p.grad = torch.ones_like(p)
        one.step()
    assert all(torch.equal(a, b) for a, b in zip(tensors(optimizer), tensors(other), strict=True))
    assert not any(a is b for a, b in zip(tensors(optimizer), tensors(other), strict=True))


def test_state_never_lies_in_a_tmpfs(disk: Path) -> None:
    shm = Path("/dev/shm")
    if not shm.is_dir():
        pytest.skip("there is no /dev/shm here")
    assert paged.filesystem(shm) == "tmpfs"
    assert paged.filesystem(disk) not in paged.IN_MEMORY
    before = mappings(shm)  # other libraries' semaphores
    there = len(mappings(paged.choose_folder(None)))  # other tests' optimizers
    optimizer = stepped(shm, 8)
    assert paged.filesystem(optimizer.page_dir) not in paged.IN_MEMORY
    assert mappings(shm) == before
    assert len(mappings(optimizer.page_dir)) == there + 1


def test_an_error_says_so_where_every_folder_lies_in_memory() -> None:
    script = (
        "import subprocess, tempfile, torch; from halfbyte.optim import AdamW\n"
        "for folder in ('/tmp', '/var/tmp'): subprocess.run(['mount', '-t', 'tmpfs', 'none', folder], check=True)\n"
        "tempfile.tempdir = '/tmp'\n"
        "try: AdamW([torch.nn.Parameter(torch.ones(9))], paged=True)\n"
        "except ValueError as error: print(type(error).__name__, error)"
    )
    in_namespace = ["unshare", "--map-root-user", "--mount"]
    probe = [*in_namespace, "mount", "-t", "tmpfs", "none", "/var/tmp"]
    if shutil.which("unshare") is None or subprocess.run(probe).returncode != 0:
        pytest.skip("this system lets nobody mount file systems in a namespace of their own")
    result = subprocess.run([*in_namespace, sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.startswith("InputError Paged optimizer state needs a folder on a disk, but /tmp, /var/tmp lie")


def test_a_missing_folder_is_refused(disk: Path) -> None:
    with pytest.raises(InputError, match="absent, does not exist"):
        stepped(disk / "absent", 8)


def test_state_larger_than_the_free_disk_is_refused_before_it_fills_it(disk: Path) -> None:
    free = shutil.disk_usage(disk).free
    with pytest.raises(InputError, match=rf"needs [\d,]+ bytes in {disk}, which has [\d,]+ free \(No space left"):
        paged.zeros([(torch.uint8, torch.Size([2 * free]))], disk)
    assert shutil.disk_usage(disk).free > free // 2


def test_a_file_that_the_system_refuses_to_extend_is_bad_input_and_leaves_no_state(disk: Path) -> None:
    p = Parameter(torch.ones(MIB))
    p.grad = torch.ones(MIB)
    optimizer = AdamW([p], paged=True, page_dir=disk)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, limits[1]))
    try:
        with pytest.raises(InputError, match=rf"needs 8,388,608 bytes in {disk}.*File too large"):
            optimizer.step()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert torch.equal(p, torch.ones(MIB))
    optimizer.step()
    assert not torch.equal(p, torch.ones(MIB))


@pytest.fixture
def small_disk(disk: Path) -> Iterator[Path]:
    """A file system of 8 MiB of its own, which takes root to mount."""
    image, mountpoint = disk / "image", disk / "mounted"
    mountpoint.mkdir()
    with image.open("wb") as file:
        file.truncate(8 * MIB)
    if os.geteuid() != 0 or shutil.which("mkfs.ext4") is None:
        pytest.skip("mounting a small file system takes root and mkfs.ext4")
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", str(image)], check=True)
    if subprocess.run(["mount", "-o", "loop", str(image), str(mountpoint)]).returncode != 0:
        pytest.skip("this system mounts no loop devices")
    try:
        yield mountpoint
    finally:
        subprocess.run(["umount", str(mountpoint)], check=True)


def test_a_really_full_disk_is_an_error_and_one_that_fills_up_later_hurts_nobody(small_disk: Path) -> None:
    free = shutil.disk_usage(small_disk).free
    with pytest.raises(InputError, match="No space left"):
        paged.zeros([(torch.uint8, torch.Size([free + 1]))], small_disk)

    (state,) = paged.zeros([(torch.float32, torch.Size([MIB]))], small_disk)
    with pytest.raises(OSError, match="No space left"), (small_disk / "filler").open("wb", buffering=0) as filler:
        while filler.write(bytes(MIB)):
            pass
    state.fill_(1)  # were its blocks not reserved, a bus fault would end the tests here
    os.sync()
    assert torch.equal(state, torch.ones(MIB))
    del state


def test_only_state_on_a_cpu_is_paged(disk: Path) -> None:
    with pytest.raises(InputError, match="Parameter 0 is on meta, and optimizer state is paged on a CPU or,"):
        AdamW([Parameter(torch.zeros(9, device="meta"))], paged=True, page_dir=disk)
