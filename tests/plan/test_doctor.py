"""Doctor's report against what the process can see for itself."""

import importlib.metadata
import os
import subprocess
import sys

import pytest

from halfbyte.kernels import native, providers, use_provider
from halfbyte.plan import doctor


def findings() -> dict[str, doctor.Finding]:
    return {finding.name: finding for finding in doctor.report()}


@pytest.mark.parametrize("library", ["torch", "transformers", "peft", "trl", "halfbyte"])
def test_it_names_the_version_of_each_library(library):
    assert findings()[library].value == importlib.metadata.version(library)


@pytest.mark.parametrize("provider", sorted(providers()))
def test_it_names_the_kernels_in_force(provider):
    with use_provider(provider):
        assert findings()["kernels"].value == provider
        assert f"{provider} kernels" in doctor.line()
        assert "\n" not in doctor.line()


@pytest.mark.skipif(not native.available(), reason="there is no native provider here")
def test_it_names_the_tier_in_force_and_those_there_are():
    value = findings()["instruction set"].value
    assert value.startswith(native.tier())
    assert all(tier in value for tier in native.tiers())
    assert f"({native.tier()})" in doctor.line()


def test_threads_held_back_by_the_environment_are_told_with_what_to_do():
    script = "from halfbyte.plan import doctor; print(*(f for f in doctor.report() if f.name == 'threads'))"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    told = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert "value='1 of" in told.stdout
    assert ("Unset OMP_NUM_THREADS" in told.stdout) == ("1 of 1 cores" not in told.stdout)


V2_HIERARCHY = {"memory.max": "max\n", "a/memory.max": "3000\n", "a/b/memory.max": "max\n"}
V1_HIERARCHY = {"memory/memory.limit_in_bytes": "9000\n", "memory/a/b/memory.limit_in_bytes": "5000\n"}


@pytest.mark.parametrize(
    ("membership", "files", "limit"),
    [
        ("0::/a/b\n", V2_HIERARCHY, 3000),
        ("0::/\n", {"memory.max": "700\n"}, 700),
        ("0::/other\n", V2_HIERARCHY, None),
        ("9:name=systemd:/\n4:cpu,memory:/a/b\n0::/\n", V1_HIERARCHY, 5000),
        ("4:memory:/not/mounted/here\n", V1_HIERARCHY, 9000),
        ("4:cpu:/a/b\n", V1_HIERARCHY, None),
        ("", V2_HIERARCHY, None),
    ],
)
def test_the_lowest_limit_on_the_way_to_the_root_counts(tmp_path, membership, files, limit):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert doctor.cgroup_memory_limit(membership, tmp_path) == limit
