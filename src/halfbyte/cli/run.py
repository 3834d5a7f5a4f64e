"""``run``: a script, module or notebook as ``python`` or Jupyter runs it, with halfbyte over the libraries it uses.

The command only notes what is to be run; :func:`halfbyte.cli.main` starts it when its own handlers are gone, so that
the script's errors, exit codes and signals are as Python has them. Nothing of ours is written to standard output.
"""

import atexit
import builtins
import contextlib
import os
import runpy
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from halfbyte.cli import notebook
from halfbyte.errors import InputError

CONTEXT = {"allow_interspersed_args": False, "ignore_unknown_options": False}

waiting: list[Callable[[], None]] = []
"""What is to be run when the command line is through."""

interrupted: list[bool] = []
"""Whether a KeyboardInterrupt has ended the script."""


def run(
    words: Annotated[
        list[str], typer.Argument(metavar="SCRIPT [ARGS]...", help="A script and its arguments, or a notebook.")
    ],
    module: Annotated[bool, typer.Option("-m", help="SCRIPT is a module's name, as of python -m.")] = False,
    cuda: Annotated[bool, typer.Option("--cuda/--no-cuda", help="Answer for a GPU that is not there.")] = True,
) -> None:
    """Run a script or notebook written for transformers, peft, trl and bitsandbytes, unchanged, on halfbyte.

    It trains in 4 bits on this machine's processor, with halfbyte's kernels; what is translated is said once on
    standard error. Options of halfbyte stand before the script.
    """
    name = words[0]
    if not module and not Path(name).is_file() and not (Path(name) / "__main__.py").is_file():
        hint = f"; for a module, halfbyte run -m {name}" if "/" not in name and not name.endswith(".py") else ""
        raise InputError(f"There is no script {name}{hint}.")
    if (as_notebook := not module and name.endswith(".ipynb")) and words[1:]:
        raise InputError(f"A notebook takes no arguments, and after {name} stands {words[1]!r}; leave it out.")
    if as_notebook:
        notebook.check(Path(name))
    atexit.register(_end_as_interrupted)
    from halfbyte.hf.install import install

    install(cuda=cuda)
    sys.argv[:] = words
    sys.path[0] = os.getcwd() if module else str(Path(name).resolve().parent)
    waiting.append(lambda: notebook.start(Path(name)) if as_notebook else _start(name, module))


def _start(name: str, module: bool) -> None:
    sys.excepthook = _without_us
    if module:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    elif Path(name).is_dir():
        runpy.run_path(name, run_name="__main__")
    else:  # as python does it: the file's name is absolute, that in sys.argv is as it was given
        file = os.path.abspath(name)
        code = compile(Path(file).read_bytes(), file, "exec")
        main = types.ModuleType("__main__")
        vars(main).update(__file__=file, __builtins__=builtins)
        sys.modules["__main__"] = main
        exec(code, vars(main))


def _without_us(kind: type[BaseException], error: BaseException, trace: types.TracebackType | None) -> None:
    """Show a script's traceback as Python does: without the frames that started it, which come first."""
    if kind is KeyboardInterrupt:
        interrupted.append(True)
    first: Any = trace
    while first is not None and first.tb_frame.f_code is not _start.__code__:
        first = first.tb_next
    if first is None:
        sys.__excepthook__(kind, error, trace)
        return
    while first is not None and first.tb_frame.f_code.co_filename in (__file__, runpy.__file__, "<frozen runpy>"):
        first = first.tb_next
    sys.__excepthook__(kind, error.with_traceback(first), first)


def _end_as_interrupted() -> None:
    """Have the interpreter end by SIGINT, as it does after an uncaught KeyboardInterrupt.

    What it keeps of that is lost when a function that runs at exit executes text, as some of torch's do. This one was
    registered before them, so it comes after.
    """
    if interrupted:
        with contextlib.suppress(KeyboardInterrupt):
            exec("raise KeyboardInterrupt")
