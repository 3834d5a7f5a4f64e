"""Errors as OpenAI's API has them: ``{"error": {"message", "type", "param", "code"}}`` and a status."""

import re
from collections.abc import Mapping
from typing import Any

from fastapi.responses import JSONResponse
from pydantic import ValidationError

from halfbyte.errors import DecodingError, InputError, nearest
from halfbyte.generate.answers import Busy, Closed

LONGEST = 600
"""Characters of a message."""
RETRY_AFTER = 1
"""Seconds after which a client that found the queue full may ask again."""
FAILED = "The server failed at this request; its log tells more under the request's id."


class ApiError(Exception):
    """What a client gets instead of an answer.

    Attributes:
        status: of HTTP.
        body: as OpenAI's clients read it.
        headers: beside it.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str | None = None,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = dict(headers or {})
        kind = kind or ("server_error" if status >= 500 else "invalid_request_error")
        self.body = {"error": {"message": _printable(message), "type": kind, "param": param, "code": code}}

    def response(self) -> JSONResponse:
        """Return the answer that tells it."""
        return JSONResponse(self.body, self.status, self.headers)


def too_many(what: str) -> ApiError:
    """Return the error of a queue that is full."""
    headers = {"retry-after": str(RETRY_AFTER)}
    return ApiError(429, what, kind="rate_limit_error", code="rate_limit_exceeded", headers=headers)


def shutting_down() -> ApiError:
    """Return the error of a server that is about to end."""
    headers = {"retry-after": "10", "connection": "close"}
    return ApiError(503, "The server is shutting down; ask again later.", code="shutting_down", headers=headers)


def told(error: BaseException, param: str | None = None) -> ApiError | None:
    """Return what the client is told of an error, or None if it is none of the client's business but a fault."""
    match error:
        case ApiError():
            return error
        case InputError():
            text = str(error).replace("max_new_tokens", "max_tokens")
            length = "attends to" in text or "keys and values" in text
            return ApiError(400, text, param=param, code="context_length_exceeded" if length else None)
        case Busy():
            return too_many("The server is busy: as many answers as may wait do already. Ask again in a moment.")
        case Closed():
            return shutting_down()
        case DecodingError():
            return ApiError(500, str(error), code="decoding_failed")
    return None


def of_schema(error: ValidationError, fields: Mapping[str, Any]) -> ApiError:
    """Return the error of a body that is not as its schema says.

    Args:
        error: pydantic's.
        fields: of the schema, for the name that is near.
    """
    found = error.errors(include_url=False)
    same = [one for one in found if one["loc"][:1] == found[0]["loc"][:1]]
    # of a union each member has its error: the one that is of the right type says more than those that are not
    first = next((one for one in same if not one["type"].endswith("_type")), found[0])
    place = [str(part) for part in first["loc"] if str(part) not in _TYPES and _NAME.fullmatch(str(part))]
    param = ".".join(place)[:100] or None
    if first["type"] == "extra_forbidden":
        near = nearest(place[-1][:60], fields) if len(place) == 1 else ""
        return ApiError(400, f"There is no parameter {param}{near}.", param=param, code="unknown_parameter")
    if first["type"] == "missing":
        return ApiError(400, f"The parameter {param} is missing.", param=param, code="missing_required_parameter")
    told = first.get("ctx", {}).get("error")
    text = first["msg"].removeprefix("Value error, ") if told is None else str(told)
    return ApiError(400, f"{param}: {text}." if param else f"{text}.", param=param, code="invalid_value")


_NAME = re.compile(r"\w+")
_TYPES = ("str", "int", "float", "list")
"""Which pydantic (2) puts into the place of an error, to name the member of a union."""


def _printable(text: str) -> str:
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


_PATH = re.compile(r"(?<![\w.:/])(?:~|\.{1,2})?/[^\s'\",;()]+[^\s'\",;().]")


def without_paths(text: str, names: Mapping[str, str]) -> str:
    """Return a sentence of ours without the server's paths.

    Args:
        text: the sentence.
        names: what some paths are called; others become ``[path]``.
    """
    for path in sorted(names, key=len, reverse=True):
        text = text.replace(path, names[path])
    return _PATH.sub("[path]", text)
