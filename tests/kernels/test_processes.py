"""The native kernels in fresh processes: a forced tier, whose threads they run on, forks."""

import os
import subprocess
import sys
import textwrap

import pytest

from halfbyte.kernels import native

pytestmark = [
    pytest.mark.skipif(not native.available(), reason="the package was installed without its extension"),
    pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc"),
]

SETUP = """
import os, signal, threading, warnings
import torch
from halfbyte import _native
from halfbyte.kernels import native, reference
from halfbyte.kernels.native import runtime
from halfbyte.quant import codebook

def quantized():
    packed, absmax = native.quantize_4bit(x, code, 64)
    return packed.numpy().tobytes(), absmax.numpy().tobytes()

def tasks():
    return len(os.listdir("/proc/self/task"))

def in_forked_children():
    for _ in range(3):
        child = os.fork()
        if child == 0:
            signal.alarm(30)  # a child that hangs is killed
            good = quantized() == expected and quantized() == expected and tasks() == 2  # itself and a pool of its own
            os._exit(0 if good else 1)
        if os.waitpid(child, 0)[1] != 0:
            return False
    return True

warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns that threads do not survive a fork
torch.set_num_threads(2)
code = codebook("nf4")
x = torch.randn(1 << 20)
expected = tuple(t.numpy().tobytes() for t in reference.quantize_4bit(x, code, 64))
"""


def run(script: str, **environment: str) -> str:
    """Run the script after SETUP in a new interpreter and return what it prints."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", SETUP + textwrap.dedent(script)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_environment_forces_a_tier_and_the_kernels_run_on_torch_s_threads() -> None:
    # Torch's threads are there after the reference has run; the kernels add none.
    script = """
        assert runtime.gomp_parallel(), "torch's OpenMP runtime was not found"
        before = tasks()
        assert before > 1
        assert quantized() == expected
        assert tasks() == before
        print(native.tier())
    """
    assert run(script, HALFBYTE_ISA="scalar") == "scalar"


def test_without_openmp_a_pool_does_the_work_for_several_callers_and_for_forked_children() -> None:
    run("""
        _native.use_openmp(0)
        before = tasks()
        assert all(quantized() == expected for _ in range(50))
        assert tasks() == before + 1
        results = []
        callers = [threading.Thread(target=lambda: results.append(quantized())) for _ in range(8)]
        for caller in callers: caller.start()
        for caller in callers: caller.join()
        assert results == [expected] * 8
        assert in_forked_children()
    """)


def test_the_pool_has_no_more_threads_than_there_ever_was_work_for() -> None:
    run("""
        _native.use_openmp(0)
        before = tasks()
        torch.set_num_threads(50)
        small = torch.randn(3 << 16)  # three ranges
        native.quantize_4bit(small, code, 64)
        assert tasks() <= before + 2, (before, tasks())
    """)


def test_forked_children_and_data_loader_workers_compute_the_same() -> None:
    run("""
        assert quantized() == expected
        assert in_forked_children()
        assert quantized() == expected

        class Rows(torch.utils.data.Dataset):
            def __len__(self): return 4
            def __getitem__(self, i): return quantized() == expected

        workers = min(2, len(os.sched_getaffinity(0)))
        loader = torch.utils.data.DataLoader(Rows(), num_workers=workers, multiprocessing_context="fork")
        assert [bool(row) for row in loader] == [True] * 4
    """)
