"""Calls of functions and their descriptions, as data sets write them, to OpenAI's form, which chat templates take.

a call          {"type": "function", "function": {"name": ..., "arguments": {...}}}, arguments as an object
a description   {"type": "function", "function": {"name": ..., "description": ..., "parameters": {JSON schema}}}
"""

import json
from collections.abc import Mapping
from typing import Any

from halfbyte.data.cells import Cells, shown, words

TOOLS = ("tools", "functions")
"""Columns that describe functions."""
CALLS = "calls of functions that were written as JSON in the answer became tool calls"


def tools_of(cells: Cells) -> list[dict[str, Any]] | None:
    """Return the functions that a row describes; None if there are none.

    Raises:
        BadRow: they are not understood.
    """
    if not cells.find(*TOOLS):
        return None
    name = cells.find(*TOOLS) or ""
    given = cells.parsed(name, cells.get(*TOOLS))
    if not given:
        return None
    listed = [given] if isinstance(given, Mapping) else given
    found = [cells.parsed(name, tool) for tool in listed] if isinstance(listed, list) else []
    if not found or not all(isinstance(tool, Mapping) for tool in found):
        raise cells.bad("tools are no list", f": {name} must be a list of functions, but it is {shown(given)}.")
    for tool in found:
        function = tool.get("function", tool)
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise cells.bad("tools are no list", f": {name} holds {shown(tool)}, a function without a name; add it.")
    return [dict(tool) if "function" in tool else {"type": "function", "function": dict(tool)} for tool in found]


def calls_of(cells: Cells, place: str, given: Any) -> list[dict[str, Any]]:
    """Return calls as templates take them.

    Args:
        cells: the row.
        place: of the calls, for messages.
        given: a call or a list of them; or JSON text of that.

    Raises:
        BadRow: they are not understood.
    """
    given = cells.parsed(place, given)
    return [_call(cells, place, call) for call in (given if isinstance(given, list | tuple) else [given])]


def calls_in(cells: Cells, text: str) -> list[dict[str, Any]]:
    """Return the calls that an answer is, if it is JSON of nothing else; else none. (xLAM's data is of that form.)"""
    if not text.lstrip().startswith(("[{", "{")):
        return []
    try:
        read = json.loads(text)
    except (ValueError, RecursionError):
        return []
    listed = read if isinstance(read, list) else [read]
    if not all(isinstance(call, dict) and call.keys() == {"name", "arguments"} for call in listed):
        return []
    cells.note(CALLS)
    return [_call(cells, "the answer", call) for call in listed]


def _call(cells: Cells, place: str, call: Any) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise cells.bad(
            "tool call not understood",
            f", {place} calls {shown(call)}; a call needs a name and arguments: write "
            '{"name": ..., "arguments": {...}}.',
        )
    arguments: Any = next(
        (function[key] for key in ("arguments", "parameters", "input") if function.get(key) is not None), {}
    )
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError) as error:
            why = error if isinstance(error, ValueError) else "nested too deeply"
            raise cells.bad("tool call not understood", f", {place} has arguments that are no JSON ({why}).") from None
    if not isinstance(arguments, Mapping):
        raise cells.bad(
            "tool call not understood",
            f", {place} calls {function['name']} with {shown(arguments)}; arguments must be an object.",
        )
    kept = {"id": words(call["id"])} if call.get("id") else {}
    return kept | {"type": "function", "function": {"name": function["name"], "arguments": dict(arguments)}}
