"""Install the torch that constraints.txt pins, and where no GPU is seen, the build without CUDA.

python tools/install_torch.py

On Linux with an x86-64 processor, PyPI's torch brings gigabytes of CUDA libraries. Without an NVIDIA GPU they are of no
use, so PyTorch's own index for CPUs is asked first. It is used for torch alone: what torch needs comes with everything
else, from pip's own index. Elsewhere PyPI's torch is right as it is. Whether the index can be reached is found out
first, within seconds; if it cannot, pip does as it always does. An installed torch of the pinned version stays.
"""

import importlib.metadata
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
PATIENCE = 6  # seconds, for the question whether the index has the build
DEVICES = ("/dev/nvidia0", "/proc/driver/nvidia")
PIP = [sys.executable, "-m", "pip"]


def pinned(constraints: str) -> str:
    """Return torch's version in the text of constraints.txt."""
    found = re.search(r"^torch==(\S+)$", constraints, re.MULTILINE)
    if found is None:
        sys.exit("constraints.txt does not pin torch.")
    return found[1]


def installed() -> str | None:
    """Return the version of the installed torch, without what names its build."""
    try:
        return importlib.metadata.version("torch").partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return None


def nvidia_gpu() -> bool:
    """Return whether there is a sign of an NVIDIA GPU: its driver's files, or an nvidia-smi that works."""
    if any(Path(device).exists() for device in DEVICES):
        return True
    if shutil.which("nvidia-smi") is None:
        return False
    try:
        return subprocess.run(["nvidia-smi", "-L"], capture_output=True, timeout=10).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def offered(build: str) -> bool:
    """Return whether PyTorch's index for CPUs has this build for this machine; False if it does not answer soon."""
    command = [*PIP, "index", "versions", "torch", "--index-url", CPU_INDEX, "--retries", "0", "--timeout", "3"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        return False
    return answer.returncode == 0 and build in re.split(r"[\s,()]+", answer.stdout)


def choose(version: str, system: str, machine: str, gpu: bool) -> tuple[list[list[str]], str]:
    """Return the arguments for pip, each list to be tried if those before failed, and what to say about it.

    Args:
        version: of torch.
        system: as ``platform.system()`` names it.
        machine: as ``platform.machine()`` names the processor.
        gpu: whether an NVIDIA GPU is seen.
    """
    plain = ["install", "--quiet", "--constraint", str(CONSTRAINTS), "torch"]
    usual, build = f"torch {version} from pip's own index", f"{version}+cpu"
    if gpu:
        return [plain], f"{usual}: an NVIDIA GPU is seen"
    if (system, machine) != ("Linux", "x86_64"):
        return [plain], f"{usual}: its build for {system} on {machine} is without CUDA"
    if not offered(build):
        return [plain], f"{usual}: no NVIDIA GPU is seen, but {CPU_INDEX} is out of reach or lacks {build}"
    cpu = ["install", "--quiet", "--retries", "2", "--index-url", CPU_INDEX, "--no-deps", f"torch=={build}"]
    return [cpu, plain], f"torch {build}, the CPU build: no NVIDIA GPU is seen"


def install(commands: list[list[str]]) -> int:
    """Run pip with the first of these arguments that succeed; return the last exit status."""
    status = 1
    for arguments in commands:
        status = subprocess.run([*PIP, *arguments]).returncode
        if status == 0:
            break
    return status


if __name__ == "__main__":
    version = pinned(CONSTRAINTS.read_text(encoding="utf-8"))
    if installed() != version:
        commands, reason = choose(version, platform.system(), platform.machine(), nvidia_gpu())
        print(reason, flush=True)
        sys.exit(install(commands))
