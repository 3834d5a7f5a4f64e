"""Tokenizers that have a template's special tokens, and the conversations that every template is tried with."""

import functools
import importlib.util
import re
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

Message = dict[str, Any]

_SPECIAL = re.compile(
    r"<\|[^|<>\s]+\|>|<｜[^｜]+｜>|<\|[a-z_]+>|<[a-z_]+\|>|<(?:start|end)_of_(?:turn|utterance)>|</s>|<sop>|\[[A-Z_/]+\]"
)
_TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>")


def trl_folder() -> Path:
    spec = importlib.util.find_spec("trl")
    assert spec and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0], "chat_templates")


def template_of(name: str) -> str:
    """The model's own template."""
    return (trl_folder() / f"{name}.jinja").read_text(encoding="utf-8")


@functools.cache
def tokenizer_for(template: str) -> PreTrainedTokenizerFast:
    """A token per byte, and one for each special token that the template names."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<|endoftext|>")
    fast.add_tokens(sorted(set(_SPECIAL.findall(template))), special_tokens=True)
    fast.add_tokens([tag for tag in _TAGS if tag in template])
    fast.chat_template = template
    return fast


def system(content: str) -> Message:
    return {"role": "system", "content": content}


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def answer(content: str, thought: str | None = None) -> Message:
    return {"role": "assistant", "content": content} | ({} if thought is None else {"reasoning_content": thought})


def call(city: str, content: str = "") -> Message:
    function = {"name": "weather", "arguments": {"city": city}}
    return {"role": "assistant", "content": content, "tool_calls": [{"type": "function", "function": function}]}


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Weather of a city.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "Its name."}}},
        },
    }
]
RESULT: Message = {"role": "tool", "name": "weather", "content": "12 C"}
INLINE = "<think>\nThought {}.\n</think>\n\nAnswer {}."

CONVERSATIONS: dict[str, list[Message]] = {
    "one turn": [user("Question one?"), answer("Answer one.")],
    "several": [user("Question one?"), answer("Answer one."), user("Question two?"), answer("Answer two.")],
    "system": [system("Be kind."), user("Question one?"), answer("Answer one.")],
    "thought": [user("Question one?"), answer("Answer one.", "Thought one.")],
    "thoughts": [
        user("Question one?"),
        answer("Answer one.", "Thought one."),
        user("Question two?"),
        answer("Answer two.", "Thought two."),
    ],
    "one of two thinks": [
        user("Question one?"),
        answer("Answer one."),
        user("Question two?"),
        answer("Answer two.", "Thought two."),
    ],
    "inline thoughts": [
        user("Question one?"),
        answer(INLINE.format("one", "one")),
        user("Question two?"),
        answer(INLINE.format("two", "two")),
    ],
    "two assistant turns": [user("Question one?"), answer("Answer one."), answer("Answer two.")],
    "two user turns": [user("Question one?"), user("Question two?"), answer("Answer one.")],
    "empty answer": [user("Question one?"), answer("")],
    "white space": [user("  Question one? \n"), answer(" \n Answer one.\n\n")],
    "tools": [user("Question one?"), call("Bonn"), RESULT, answer("Answer one.")],
    "calls and texts": [user("Question one?"), call("Bonn", "Looking."), RESULT, answer("Answer one.")],
    "parts": [
        {"role": "user", "content": [{"type": "text", "text": "Question one?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Answer one."}]},
    ],
    "two system turns": [system("Be kind."), system("Be brief."), user("Question one?"), answer("Answer one.")],
    "later system": [
        system("Be kind."),
        user("Question one?"),
        answer("Answer one."),
        system("Be brief."),
        user("Question two?"),
        answer("Answer two."),
    ],
    "assistant first": [answer("Hello."), user("Question one?"), answer("Answer one.")],
}
WITH_TOOLS = ("tools", "calls and texts")


def tools_of(name: str) -> list[dict[str, Any]] | None:
    return TOOLS if name in WITH_TOOLS else None
