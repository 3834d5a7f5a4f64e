"""llama.cpp where it is installed: what makes k-quants (q4_k_m and so on) of an f16 file, by its own recipe.

Which tensors get which bits is llama.cpp's to say (``llama_model_quantize``). It is looked for in this order:

    llama-quantize        the program, on the PATH
    node-llama-cpp        the package of npm in the cache, where ``halfbyte bench decode`` puts it too

The library is called in a process of its own, since it ends the process where it fails.
"""

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path

from halfbyte.errors import InputError
from halfbyte.files import cache_folder

FTYPES = {"q4_k_s": 14, "q4_k_m": 15, "q5_k_s": 16, "q5_k_m": 17, "q6_k": 18}
"""llama.cpp's numbers (``llama_ftype``)."""
PROGRAM = "llama-quantize"
PACKAGES = ("node-llama-cpp@3.22.1", "@node-llama-cpp/linux-x64@3.22.1")
"""npm's, which hold llama.cpp v0.5.0 for Linux on x86."""
PARAMETERS = 4096
"""Bytes that hold ``llama_model_quantize_params`` of any version: it begins with the threads and the type."""


def node_folder() -> Path:
    """Return the folder in which npm's packages are, or would be."""
    return cache_folder() / "llama.cpp"


def library() -> Path | None:
    """Return llama.cpp's shared library, or None where there is none."""
    return next((node_folder() / "node_modules/@node-llama-cpp").glob("*/bins/*/libllama.*so*"), None)


def check_quantizer(kind: str) -> None:
    """Make sure that :func:`quantize` can make files of the type ``kind``.

    Raises:
        InputError: llama.cpp is not here; with the command that does it elsewhere.
    """
    if shutil.which(PROGRAM) is None and library() is None:
        raise InputError(
            f"{kind} is made by llama.cpp, which is not installed here: put its {PROGRAM} on the PATH, or run npm "
            f"install --prefix {node_folder()} --ignore-scripts --omit=optional {' '.join(PACKAGES)}; or export f16, "
            f"and where llama.cpp is run {PROGRAM} MODEL-f16.gguf MODEL-{kind}.gguf {kind.upper()}"
        )


def quantize(source: Path, target: Path, kind: str, threads: int) -> None:
    """Write the file ``target``, of the type ``kind``, of the f16 file ``source``.

    Raises:
        InputError: llama.cpp is not here, or it failed.
    """
    check_quantizer(kind)
    if program := shutil.which(PROGRAM):
        command = [program, str(source), str(target), kind.upper(), str(threads)]
    else:
        command = [sys.executable, __file__, str(library()), str(source), str(target), str(FTYPES[kind]), str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode or not target.is_file():
        said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        raise InputError(
            f"llama.cpp could not make {kind} of the file (exit code {done.returncode}): "
            f"{said[-1].strip() if said else 'it said nothing'}"
        )


def _call(library: str, source: str, target: str, ftype: int, threads: int) -> int:
    """Call the library's function (llama.h); it takes and gives its parameters as a structure."""
    llama = ctypes.CDLL(library)

    class Parameters(ctypes.Structure):
        _fields_ = (("threads", ctypes.c_int32), ("ftype", ctypes.c_int32), ("rest", ctypes.c_uint8 * PARAMETERS))

    llama.llama_model_quantize_default_params.restype = Parameters
    parameters = llama.llama_model_quantize_default_params()
    parameters.threads, parameters.ftype = threads, ftype
    llama.llama_model_quantize.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(Parameters))
    llama.llama_model_quantize.restype = ctypes.c_uint32
    return int(llama.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(parameters)))


if __name__ == "__main__":
    _, library_, source_, target_, ftype_, threads_ = sys.argv
    sys.exit(_call(library_, source_, target_, int(ftype_), int(threads_)))
