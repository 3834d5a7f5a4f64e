"""``ui``, with a flag for each field of :class:`halfbyte.deploy.ui.options.UiOptions`, made from it."""

import importlib.util
from typing import Any

from halfbyte.cli.console import notes
from halfbyte.cli.options import flags_of
from halfbyte.deploy.ui.options import UiOptions
from halfbyte.errors import InputError

NEEDS = ("gradio", "fastapi", "uvicorn", "prometheus_client", "llguidance")


def ui(**options: Any) -> None:
    """Open the web page: train, watch, chat, merge and export without a terminal, in English and Chinese.

    It listens on this machine alone. What it starts goes on when it ends.
    """
    given = {name: value for name, value in options.items() if value is not None}
    wanted = UiOptions.from_yaml(given.pop("config", None), given)
    if lacking := [name for name in NEEDS if importlib.util.find_spec(name) is None]:
        raise InputError(f"halfbyte ui needs {lacking[0]}: pip install 'halfbyte[ui]'.")
    from halfbyte.deploy.ui.server import serve

    def ready(url: str) -> None:
        notes.print(f"The page is {url} (Ctrl-C ends it; runs go on)", markup=False, highlight=False, soft_wrap=True)

    serve(wanted, ready)


ui.__signature__ = flags_of(UiOptions)  # type: ignore[attr-defined]
