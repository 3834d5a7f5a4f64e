"""What templates are tried with: conversations of made-up words, a thought, and a tool."""

from halfbyte.data.examples import Message
from halfbyte.data.messages import Calls, as_called

WORDS = ("Kumquat", "Halibut", "Zither", "Gazebo", "Obelisk", "Walrus", "Jasmine", "Tundra")
"""Contents of the turns of a trial: nothing that a template would look for, and no beginning or end in common."""
THOUGHT, TOOL, KEY, VALUE, RESULT, ABOUT = "Pumice", "quince", "vessel", "Marzipan", "Lagoon", "Begonia"

TRIALS: dict[str, tuple[str, ...]] = {
    "system": ("system", "user", "assistant"),
    "systems in a row": ("system", "system", "user", "assistant"),
    "later system": ("system", "user", "assistant", "system", "user", "assistant"),
    "users in a row": ("user", "user", "assistant", "user", "user", "assistant"),
    "assistants in a row": ("user", "assistant", "assistant", "user", "assistant", "assistant"),
    "assistant first": ("assistant", "user", "assistant"),
}
"""What a conversation may have that not every template takes: the roles of one that has it."""


def calling(value: str, calls: Calls) -> Message:
    """Return a message that calls ``TOOL`` with one argument."""
    function = {"name": TOOL, "arguments": {KEY: value}}
    return as_called({"role": "assistant", "tool_calls": [{"function": function}]}, calls, 0)


SCHEMA = {
    "type": "function",
    "function": {
        "name": TOOL,
        "description": ABOUT,
        "parameters": {
            "type": "object",
            "properties": {KEY: {"type": "string", "description": KEY}},
            "required": [KEY],
        },
    },
}
