"""Calls of functions in an answer, in the forms that chat templates have models write:

hermes      <tool_call>\\n{"name": ..., "arguments": {...}}\\n</tool_call>, one or several   (Qwen, Hermes, SmolLM3)
bare        {"name": ..., "parameters": {...}}, the whole answer                             (Llama 3.1 and later)

Which form it is, the template tells: it shows the model an example. Other forms are not known, and requests with tools
are refused then, since a call would come back as text.
"""

import json
import re
import secrets
from dataclasses import dataclass
from typing import Any, Literal

from halfbyte.deploy.serve.schemas import FunctionTool
from halfbyte.errors import InputError

BEGIN, END = "<tool_call>", "</tool_call>"
SPACED = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""How llguidance spaces JSON: as templates show it, so that no model goes on with blanks for ever."""
_HERMES = re.compile(re.escape(BEGIN) + r"\s*(.*?)\s*(?:" + re.escape(END) + r"|\Z)", re.DOTALL)


@dataclass(frozen=True)
class ToolForm:
    """How a model writes calls.

    Attributes:
        kind: see the module.
        parallel: whether an answer may have several; else those after the first are left out.
    """

    kind: Literal["hermes", "bare"]
    parallel: bool = True

    @classmethod
    def of(cls, template: str) -> "ToolForm | None":
        """Return the form that a chat template shows, or None if it is not known or there are no tools."""
        if "tools" not in template:
            return None
        if BEGIN in template and '"name"' in template.replace("\\", ""):
            return cls("hermes")
        if re.search(r"""["\\{]+name["\\]+: ?function name""", template) and "parameters" in template:
            return cls("bare")
        return None

    def held(self, text: str, is_end: bool) -> int:
        """Return how many characters at the beginning of an answer's text are certainly no call; streams show these."""
        if self.kind == "bare":
            return 0 if text.lstrip()[:1] in ("{", "") and not is_end else len(text)
        found = text.find(BEGIN)
        if found >= 0:
            return found
        longest = 0 if is_end else min(len(text), len(BEGIN) - 1)
        return len(text) - next((size for size in range(longest, 0, -1) if BEGIN.startswith(text[-size:])), 0)

    def read(self, text: str) -> tuple[str, list[dict[str, Any]]]:
        """Return an answer's text beside its calls, and the calls; none where one cannot be read: then it is text."""
        if self.kind == "bare":
            call = _call(text)
            return (text, []) if call is None else ("", [call])
        if BEGIN not in text:
            return text, []
        calls = [_call(match[1]) for match in _HERMES.finditer(text)]
        known = [call for call in calls if call is not None]
        if len(known) < len(calls):
            return text, []
        return text[: text.find(BEGIN)].rstrip(), known if self.parallel else known[:1]

    def grammar(self, tools: list[FunctionTool]) -> str:
        """Return a grammar, in Lark's notation, of an answer that calls one of some functions."""
        word = "arguments" if self.kind == "hermes" else "parameters"
        schemas = [
            {
                "type": "object",
                "properties": {"name": {"const": tool.name}, word: tool.parameters or {"type": "object"}},
                "required": ["name", word],
                "additionalProperties": False,
            }
            for tool in tools
        ]
        try:
            text = json.dumps({"anyOf": schemas, "x-guidance": SPACED}, allow_nan=False)
        except (ValueError, RecursionError) as error:
            raise InputError(f"The parameters of a tool are no JSON schema: {error}.") from None
        if self.kind == "bare":
            return f"start: call\ncall: %json {text}\n"
        return f'start: "{BEGIN}\\n" call "\\n{END}"\ncall: %json {text}\n'


def _call(text: str) -> dict[str, Any] | None:
    try:
        given = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(given, dict) or not isinstance(given.get("name"), str):
        return None
    arguments = given.get("arguments", given.get("parameters", {}))
    if not isinstance(arguments, dict):
        return None
    written = json.dumps(arguments, ensure_ascii=False)
    function = {"name": given["name"], "arguments": written}
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}
