"""A request's body: read within limits of size and time, as strict JSON.

Python's reader takes more than JSON and than is good: NaN, numbers that become infinite, brackets within brackets until
its stack is full, halves of characters. Here these are errors of the client's, told as such.
"""

import asyncio
import json
import math
from typing import Any, Never, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError

from halfbyte.deploy.serve.errors import ApiError, of_schema
from halfbyte.deploy.serve.options import PATIENCE

DEEPEST = 64
"""Brackets within brackets."""
LARGEST = 2**64
"""Whole numbers are smaller."""

Schema = TypeVar("Schema", bound=BaseModel)


class ClientGone(Exception):
    """The client has hung up: nobody reads an answer."""


async def body(request: Request, schema: type[Schema], most: int) -> Schema:
    """Read the body of a request.

    Args:
        request: whose.
        schema: what it must be.
        most: bytes.

    Raises:
        ApiError: it is not JSON, not as the schema says, too large, or does not come.
        ClientGone: the client has hung up.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "The body must be JSON; send it with the header Content-Type: application/json.")
    try:
        async with asyncio.timeout(PATIENCE):
            raw = await _read(request, most)
    except TimeoutError:
        close = {"connection": "close"}
        raise ApiError(408, f"The body did not come within {PATIENCE:.0f} seconds.", headers=close) from None
    value = read_json(raw)
    if not isinstance(value, dict):
        raise ApiError(400, "The body must be a JSON object.")
    try:
        return schema.model_validate(value)
    except ValidationError as error:
        raise of_schema(error, schema.model_fields) from None
    except RecursionError:
        raise ApiError(400, "The body has too many brackets within brackets.") from None


async def _read(request: Request, most: int) -> bytes:
    def too_large() -> ApiError:
        return ApiError(
            413, f"The body is larger than the {most:,} bytes that are taken.", headers={"connection": "close"}
        )

    length = request.headers.get("content-length", "")
    if length.isdigit() and (len(length) > 15 or int(length) > most):
        raise too_large()
    parts = bytearray()
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        parts += message.get("body", b"")
        if len(parts) > most:
            raise too_large()
        if not message.get("more_body"):
            return bytes(parts)


def read_json(raw: bytes) -> Any:
    """Return what a body says.

    Raises:
        ApiError: it is not JSON in UTF-8, or nested too deeply, or a number is too large.
    """
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ApiError(400, f"The body is not UTF-8 text: the byte {raw[error.start]:#04x} at {error.start}.") from None
    try:
        value = json.loads(text, parse_constant=_no_constant, parse_float=_finite, parse_int=_small)
    except json.JSONDecodeError as error:
        raise ApiError(
            400, f"The body is not JSON: {error.msg} at line {error.lineno}, column {error.colno}."
        ) from None
    except RecursionError:
        raise ApiError(400, "The body has too many brackets within brackets.") from None
    _check(value)
    return value


def _no_constant(word: str) -> Never:
    raise ApiError(400, f"The body holds {word}, which is not JSON.")


def _finite(digits: str) -> float:
    if not math.isfinite(number := float(digits)):
        raise ApiError(400, "The body holds a number that is too large.")
    return number


def _small(digits: str) -> int:
    if len(digits) > 25 or abs(number := int(digits)) >= LARGEST:
        raise ApiError(400, "The body holds a whole number of 64 bits or more.")
    return number


def _check(value: Any) -> None:
    """Check depth and characters, without recursion."""
    level = [value]
    for _ in range(DEEPEST):
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below += item
                below += item.values()
            elif isinstance(item, list):
                below += item
            elif isinstance(item, str) and not item.isascii():
                _check_characters(item)
        if not below:
            return
        level = below
    raise ApiError(400, f"The body has more than {DEEPEST} brackets within brackets.")


def _check_characters(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ApiError(400, f"The body holds half of a character, \\u{ord(text[error.start]):04x}.") from None
