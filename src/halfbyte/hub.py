"""The Hugging Face hub, asked once and with a time limit, before anything is downloaded.

huggingface_hub (2.4) itself goes on trying for half a minute where there is no network, and looking up a host's name
heeds no time limit. So the hub is asked in a thread, and without an answer things go on as without a network.
"""

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from huggingface_hub import HfApi

PATIENCE = 2.0
"""Seconds that the hub has to answer in."""


def reason_without(ask: Callable[["HfApi"], Any], what: str) -> str | None:
    """Return why the hub cannot give something, as a clause, or None if it can.

    Args:
        ask: asks for it, with ``PATIENCE`` for its own time limit.
        what: is asked for, such as ``model``.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

    outcome: list[Exception | None] = []

    def answer() -> None:
        try:
            ask(HfApi())
            outcome.append(None)
        except Exception as error:  # carried to the caller, who raises what is not known
            outcome.append(error)

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    thread.join(PATIENCE + 0.5)
    error = outcome[0] if outcome else httpx.TimeoutException(f"no answer within {PATIENCE:.0f} s")
    if error is None:
        return None
    if isinstance(error, RepositoryNotFoundError):
        return f"the hub has no such {what}, or none that you may see (hf auth login)"
    if isinstance(error, HfHubHTTPError):
        return f"the hub refuses to say whether it has such a {what} ({first_line(error)})"
    if isinstance(error, httpx.TransportError | OSError):
        return f"the hub cannot be reached ({first_line(error)})"
    raise error


def first_line(error: BaseException) -> str:
    """Return the first line of an error of the hub's libraries, for the middle of a sentence."""
    return str(error).strip().split("\n")[0].strip().rstrip(".")
