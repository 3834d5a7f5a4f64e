"""The kernels without Python: this folder's program, built with sanitizers, and for 64-bit Arm under an emulator."""

import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
BUILD = HERE.parents[1] / "build" / "native"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (shutil.which("c++") and shutil.which("make")), reason="no C++ compiler, or no make"),
]


def build(variant: str) -> Path:
    subprocess.run(["make", "-s", "-j2", "-C", HERE, variant], check=True)
    return BUILD / variant / "check"


def passes(*command: str | Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_kernel_reads_or_writes_beyond_its_buffers_and_all_tiers_agree() -> None:
    passes(build("sanitize"), "--cases", "60")


def test_threads_do_not_race() -> None:
    program = build("threads")
    for group in ("parallel", "matmul", "few", "attention", "adamw_8bit"):
        passes(program, "--group", group, "--cases", "10")


@pytest.mark.skipif(
    not (shutil.which("aarch64-linux-gnu-g++") and shutil.which("qemu-aarch64")),
    reason="no cross compiler or no emulator for 64-bit Arm: apt-get install g++-aarch64-linux-gnu qemu-user",
)
def test_arm_kernels_do_as_well() -> None:
    # The emulator cannot be asked for what is still allocated.
    emulator = ["env", "ASAN_OPTIONS=detect_leaks=0", "qemu-aarch64", "-L", "/usr/aarch64-linux-gnu"]
    passes(*emulator, build("neon"), "--cases", "15")


@pytest.mark.skipif(not shutil.which("clang++"), reason="no clang")
@pytest.mark.parametrize("target", ["", "aarch64-linux-gnu"])
def test_clang_has_nothing_to_say(target: str) -> None:
    if target and not shutil.which(f"{target}-g++"):
        pytest.skip("no headers of 64-bit Arm")
    options = [f"--target={target}"] if target else []
    options += ["-std=c++17", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-fsyntax-only"]
    for source in (HERE.parents[1] / "csrc").glob("*.cpp"):
        if source.name != "bindings.cpp":  # which needs Python's headers
            passes("clang++", *options, source)


def test_a_wrong_option_is_an_error() -> None:
    program = build("sanitize")
    for options in (["--tier", "none"], ["--case", "3"]):
        assert subprocess.run([program, *options], capture_output=True).returncode == 2
