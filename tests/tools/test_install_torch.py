"""Which torch is installed where, with a program in pip's place that keeps a record of what it is asked."""

import subprocess
import sys
from pathlib import Path

import pytest

import install_torch
from install_torch import CPU_INDEX, choose, install

OFFER = "torch (2.13.0+cpu)\nAvailable versions: 2.13.0+cpu, 2.12.1+cpu"


class Pip:
    """A pip that knows ``offer`` on the index for CPUs (None: out of reach), and whose installs there may fail."""

    def __init__(self, folder: Path) -> None:
        self.script = folder / "pip.py"
        self.record = folder / "record"
        self.behaves(OFFER)

    def behaves(self, offer: str | None, *, installs: bool = True, sleeps: int = 0) -> None:
        self.script.write_text(
            "import sys, time\n"
            f"open({str(self.record)!r}, 'a').write(' '.join(sys.argv[1:]) + '\\n')\n"
            "asked = '--index-url' in sys.argv\n"
            "if sys.argv[1] == 'index':\n"
            f"    time.sleep({sleeps})\n"
            f"    sys.exit(print({offer!r}) if {offer!r} else 1)\n"
            f"sys.exit(asked and not {installs})\n"
        )

    def asked(self) -> list[str]:
        return self.record.read_text().splitlines() if self.record.exists() else []


@pytest.fixture
def pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pip:
    fake = Pip(tmp_path)
    monkeypatch.setattr(install_torch, "PIP", [sys.executable, str(fake.script)])
    return fake


@pytest.mark.parametrize(
    ("system", "machine", "gpu", "reason"),
    [
        ("Linux", "x86_64", True, "an NVIDIA GPU is seen"),
        ("Linux", "aarch64", True, "an NVIDIA GPU is seen"),
        ("Linux", "aarch64", False, "Linux on aarch64"),
        ("Darwin", "arm64", False, "Darwin on arm64"),
        ("Darwin", "x86_64", False, "Darwin on x86_64"),
    ],
)
def test_where_plain_pip_is_right_the_index_is_not_asked(pip, system, machine, gpu, reason):
    commands, said = choose("2.13.0", system, machine, gpu)
    assert [command[-1] for command in commands] == ["torch"]
    assert "--index-url" not in commands[0] and "--constraint" in commands[0]
    assert reason in said
    assert pip.asked() == []


def test_without_a_gpu_torch_alone_comes_from_the_index_for_cpus(pip):
    commands, reason = choose("2.13.0", "Linux", "x86_64", False)
    assert "the CPU build: no NVIDIA GPU is seen" in reason
    assert install(commands) == 0
    question, installation = pip.asked()
    assert question.startswith(f"index versions torch --index-url {CPU_INDEX} --retries 0 --timeout")
    assert f"--index-url {CPU_INDEX} --no-deps torch==2.13.0+cpu" in installation


@pytest.mark.parametrize("offer", [None, "torch (2.12.1+cpu)\nAvailable versions: 2.12.1+cpu, 2.13.0.post1+cpu"])
def test_an_index_out_of_reach_or_without_the_version_leaves_plain_pip(pip, offer):
    pip.behaves(offer)
    commands, reason = choose("2.13.0", "Linux", "x86_64", False)
    assert "out of reach or lacks 2.13.0+cpu" in reason
    assert install(commands) == 0
    assert len(pip.asked()) == 2 and pip.asked()[1].endswith("constraints.txt torch")


def test_an_index_that_does_not_answer_is_not_waited_for(pip, monkeypatch):
    monkeypatch.setattr(install_torch, "PATIENCE", 0.2)
    pip.behaves(OFFER, sleeps=60)
    assert not install_torch.offered("2.13.0+cpu")


def test_plain_pip_follows_if_the_index_fails_in_the_middle(pip):
    pip.behaves(OFFER, installs=False)
    commands, _ = choose("2.13.0", "Linux", "x86_64", False)
    assert install(commands) == 0
    assert pip.asked()[-1].endswith("constraints.txt torch")


def test_an_exit_status_of_pip_is_handed_on(pip):
    pip.script.write_text("import sys\nsys.exit(3)\n")
    assert install([["install", "torch"]]) == 3


def test_a_gpu_is_seen_by_its_drivers_files_or_a_working_nvidia_smi(tmp_path, monkeypatch):
    device, program = tmp_path / "nvidia0", tmp_path / "nvidia-smi"
    monkeypatch.setattr(install_torch, "DEVICES", (str(device),))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not install_torch.nvidia_gpu()
    for status in (9, 0):
        program.write_text(f"#!/bin/sh\nexit {status}\n")
        program.chmod(0o755)
        assert install_torch.nvidia_gpu() == (status == 0)
    program.unlink()
    device.touch()
    assert install_torch.nvidia_gpu()


def test_the_pinned_torch_that_is_installed_already_stays():
    script = Path(install_torch.__file__)
    version = install_torch.pinned(install_torch.CONSTRAINTS.read_text())
    if install_torch.installed() != version:
        pytest.skip(f"the torch installed here is not {version}")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
