"""A Modelfile for Ollama: where the model is, how a conversation becomes text, where an answer ends.

Ollama (template/template.go) renders conversations by Go's text/template. A chat template of a GGUF file it takes for
the one of its own that is nearest; where none is near, a conversation is its messages' text and nothing else. So the
template is written here: it is read off from what the model's own renders for conversations of marks,

    with or without a system text:    what comes before the first user's text
    within:                           what is between a user's text and its answer, between an answer and the next text
    at the end:                       what is behind the last user's text, where the answer to come begins

and tried on longer ones. A template that rewrites what it has written has no such form; then the file says so, and
llama.cpp's own programs render the template in the GGUF file.

Ollama puts the first token before the text itself, so that is left out.
"""

import json
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

PARAMETERS = {
    "temperature": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}  # fmt: skip
"""transformers' generation settings, and Ollama's names for them."""
SYSTEM, USER, ANSWER = "system", "user", "assistant"
TRIED = ((USER,), (SYSTEM, USER), (USER, ANSWER, USER), (SYSTEM, USER, ANSWER, USER), (USER, ANSWER) * 2 + (USER,))
NO_TEMPLATE = (
    "# The model's chat template has no counterpart in Ollama's language, so there is none here: llama-server --jinja\n"
    "# and llama-cli --jinja render the one in the GGUF file."
)
NO_SYSTEM = "# The chat template takes no system text; one that is given is left out."
DATED = "# The chat template writes the date; the one of this export stands here."


@dataclass(frozen=True)
class Turns:
    """What a chat template writes around texts.

    Attributes:
        system: before the system text, and between it and the first user's; None where there can be none.
        first: before the first user's text, where there is no system text.
        answered: between a user's text and its answer.
        asked: between an answer and the next user's text.
        generation: behind the last user's text.
    """

    system: tuple[str, str] | None
    first: str
    answered: str
    asked: str
    generation: str

    def render(self, messages: list[dict[str, str]]) -> str:
        """Return the text of a conversation that ends with a user's turn."""
        text = self.first
        for i, message in enumerate(messages):
            content, last = message["content"], i == len(messages) - 1
            if message["role"] == SYSTEM:
                assert self.system is not None
                text = content.join(self.system)
            elif message["role"] == USER:
                text += content + (self.generation if last else self.answered)
            else:
                text += content + self.asked
        return text

    def template(self) -> str:
        """Return the same in Go's language."""
        first = _go(self.first)
        if self.system is not None:
            before, behind = self.system
            first = f"{{{{ if .System }}}}{_go(before)}{{{{ .System }}}}{_go(behind)}{{{{ else }}}}{first}{{{{ end }}}}"
        return (
            f"{first}"
            "{{- range $i, $_ := .Messages }}{{- $last := eq (len (slice $.Messages $i)) 1 }}"
            '{{- if eq .Role "user" }}{{ .Content }}'
            f"{{{{ if $last }}}}{_go(self.generation)}{{{{ else }}}}{_go(self.answered)}{{{{ end }}}}"
            '{{- else if eq .Role "assistant" }}{{ .Content }}'
            f"{{{{ if not $last }}}}{_go(self.asked)}{{{{ end }}}}"
            "{{- end }}{{- end }}"
        )


def turns_of(tokenizer: PreTrainedTokenizerBase, begins: bool) -> Turns | None:
    """Return what the tokenizer's chat template writes around texts; None where it is no such template.

    Args:
        tokenizer: with a template.
        begins: whether the first token is put before texts anyway.
    """
    try:
        return _read_off(tokenizer, begins)
    except (TemplateError, ValueError, TypeError, KeyError, IndexError):
        return None  # it refuses such conversations, or its text lacks a mark


def modelfile(file: str, tokenizer: PreTrainedTokenizerBase, stops: list[int], generation: Any, begins: bool) -> str:
    """Return a Modelfile.

    Args:
        file: name of the GGUF file beside it.
        tokenizer: of the model.
        stops: tokens that end an answer.
        generation: transformers' generation settings, or None.
        begins: whether the file has the first token put before texts.
    """
    lines = [f"FROM ./{file}"]
    turns = turns_of(tokenizer, begins) if tokenizer.chat_template else None
    if turns is not None:
        if turns.system is None:
            lines.append(NO_SYSTEM)
        if "strftime_now" in str(tokenizer.chat_template):
            lines.append(DATED)
        lines.append(f'TEMPLATE """{turns.template()}"""')
    elif tokenizer.chat_template:
        lines.append(NO_TEMPLATE)
    for token in stops:
        lines.append(f"PARAMETER stop {_quoted(tokenizer.convert_ids_to_tokens(token))}")
    given = generation.to_diff_dict() if generation is not None else {}
    for name, theirs in PARAMETERS.items():
        if isinstance(given.get(name), int | float):
            lines.append(f"PARAMETER {theirs} {given[name]}")
    return "\n".join(lines) + "\n"


def _read_off(tokenizer: PreTrainedTokenizerBase, begins: bool) -> Turns | None:
    begin = tokenizer.bos_token if begins and tokenizer.bos_token else ""

    def render(*roles: str) -> str:
        text: str = tokenizer.apply_chat_template(_marked(roles), tokenize=False, add_generation_prompt=True)
        return text.removeprefix(begin)

    first, answered, asked, generation = _cut(render(USER, ANSWER, USER), (USER, 0), (ANSWER, 0), (USER, 1))
    system: tuple[str, str] | None = None
    try:
        before, behind, _ = _cut(render(SYSTEM, USER), (SYSTEM, 0), (USER, 0))
        system = (before, behind)
    except (TemplateError, ValueError):
        pass  # there can be none
    turns = Turns(system, first, answered, asked, generation)
    tried = [roles for roles in TRIED if system is not None or SYSTEM not in roles]
    return turns if all(turns.render(_marked(roles)) == render(*roles) for roles in tried) else None


def _marked(roles: tuple[str, ...]) -> list[dict[str, str]]:
    counts: dict[str, int] = {}
    messages = []
    for role in roles:
        number = counts.get(role, 0)
        counts[role] = number + 1
        messages.append({"role": role, "content": _mark(role, number)})
    return messages


def _mark(role: str, number: int) -> str:
    return f"{role.upper()}-MARK-{number}-END"


def _cut(text: str, *marks: tuple[str, int]) -> list[str]:
    """Return the parts of a text between marks, each of which it has once."""
    parts = []
    for role, number in marks:
        part, text = text.split(_mark(role, number))
        parts.append(part)
    return [*parts, text]


def _go(text: str) -> str:
    """Return a literal text in Go's language."""
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""


def _quoted(text: str) -> str:
    return f'"{text}"'
