"""``serve``, with a flag for each field of :class:`halfbyte.deploy.serve.options.ServeOptions`, made from it."""

import contextlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from halfbyte.cli.console import INTERRUPTED, notes
from halfbyte.cli.options import Model, flags_of
from halfbyte.deploy.serve.options import ServeOptions
from halfbyte.errors import InputError
from halfbyte.quiet import quiet

NEEDS = ("fastapi", "uvicorn", "prometheus_client", "llguidance")
INSTALL = "halfbyte serve needs {}: pip install 'halfbyte[serve]'."


def serve(model: str, **options: Any) -> None:
    """Serve a model and adapters over it by OpenAI's HTTP API.

    The first Ctrl-C or SIGTERM lets answers end, the second one ends them.
    """
    wanted = ServeOptions.from_yaml(None, {name: value for name, value in options.items() if value is not None})
    if lacking := [name for name in NEEDS if importlib.util.find_spec(name) is None]:
        raise InputError(INSTALL.format(lacking[0]))
    with quiet(), _log(wanted.access_log) as log:
        from halfbyte.deploy.serve.running import serve as run

        def ready(url: str, about: str) -> None:
            notes.print(f"{about}\n{url} (Ctrl-C ends)", markup=False, highlight=False, soft_wrap=True)

        if not run(model, wanted, log, ready):
            notes.print("Interrupted.")
            sys.exit(INTERRUPTED)


@contextlib.contextmanager
def _log(name: str) -> Iterator[TextIO | None]:
    """Yield where the log goes."""
    if name == "none":
        yield None
    elif name == "-":
        yield sys.stderr
    else:
        try:
            file = Path(name).expanduser().open("a", encoding="utf-8")
        except OSError as error:
            raise InputError(f"The log {name} cannot be written: {error.strerror}; name another file.") from None
        with file:
            yield file


serve.__signature__ = flags_of(ServeOptions, None, True, model=Model)  # type: ignore[attr-defined]
