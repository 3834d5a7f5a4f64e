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
