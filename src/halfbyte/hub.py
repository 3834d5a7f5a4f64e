"""The Hugging Face hub, asked once and with a time limit, before anything is downloaded.

huggingface_hub (2.4) itself goes on trying for half a minute where there is no network, and looking up a host's name
heeds no time limit. So the hub is asked in a thread, and without an answer things go on as without a network.
"""

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from huggingface_hub import HfApi

T = TypeVar("T")

PATIENCE = 2.0
"""Seconds that the hub has to answer in."""


def reason_without(ask: Callable[["HfApi"], Any], what: str) -> str | None:
    """Return why the hub cannot give something, as a clause, or None if it can.

    Args:
        ask: asks for it, with ``PATIENCE`` for its own time limit.
        what: is asked for, such as ``model``.
    """
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

    try:
        asked(ask)
        return None
    except Exception as raised:
        error = raised
    if isinstance(error, RepositoryNotFoundError):
        return f"the hub has no such {what}, or none that you may see (hf auth login)"
    if isinstance(error, HfHubHTTPError):
        return f"the hub refuses to say whether it has such a {what} ({first_line(error)})"
    if isinstance(error, httpx.TransportError | OSError):
        return f"the hub cannot be reached ({first_line(error)})"
    raise error


def asked(ask: Callable[["HfApi"], T], patience: float = PATIENCE) -> T:
    """Return the hub's answer.

    Args:
        ask: asks for it.
        patience: seconds that the hub has for it.

    Raises:
        Exception: whatever ``ask`` raises; without an answer httpx's TimeoutException.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

    answers: list[T] = []
    errors: list[Exception] = []

    def answer() -> None:
        try:
            answers.append(ask(HfApi()))
        except Exception as error:  # carried to the caller
            errors.append(error)

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    thread.join(patience + 0.5)
    if errors:
        raise errors[0]
    if not answers:
        raise httpx.TimeoutException(f"no answer within {patience:.0f} s")
    return answers[0]


def first_line(error: BaseException) -> str:
    """Return the first line of an error of the hub's libraries, for the middle of a sentence."""
    return str(error).strip().split("\n")[0].strip().rstrip(".")
