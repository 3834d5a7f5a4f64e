"""Templates of makers whose TRL ships none, written after their published behaviour: what each conversation trains.

The expectations are closed: what an answer looks like by the maker's description of the format, and the text that
``apply_chat_template`` gives generation for the same turns. ``templates_published`` has the templates.
"""

import dataclasses
import functools
from collections import Counter
from pathlib import Path

import pytest

from halfbyte.data import BadRow, Chat
from halfbyte.data import fitting as notes
from halfbyte.data.rendering import Thinking
from halfbyte.data.template import Writer

from .templates import CONVERSATIONS, INLINE, WITH_TOOLS, Message, answer, system, tokenizer_for, tools_of, user

FOLDER = Path(__file__).parent / "templates_published"


@dataclasses.dataclass(frozen=True)
class Format:
    """What a maker publishes of a format.

    Attributes:
        stop: what closes an answer.
        alternates: user and assistant must take turns.
        systems: "any", "first" (one, at the beginning), or "none" (the text goes before the user's).
        thoughts: "inline" in the answer's text, "after" the ``<think>`` that the prompt ends in, or "none".
        close: between a thought and its answer, where the prompt opens it.
        calls: what a call of ``weather`` in Bonn looks like, without its stop; None: there is no way.
    """

    stop: str
    alternates: bool = False
    systems: str = "any"
    thoughts: str = "inline"
    close: str = ""
    calls: str | None = None


NEMO_CALL = '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Bonn"}, "id": "call00000"}]'

FORMATS: dict[tuple[str, Thinking | None], Format] = {
    ("mistral_7b", None): Format("<|endoftext|>", alternates=True, systems="none"),
    ("mistral_nemo", None): Format("<|endoftext|>", alternates=True, systems="none", calls=NEMO_CALL),
    ("olmo_2", None): Format("<|endoftext|>"),
    ("granite_3", None): Format("<|end_of_text|>"),
    ("granite_3", "on"): Format("<|end_of_text|>"),
    ("granite_3", "off"): Format("<|end_of_text|>", thoughts="none"),
    ("smollm_2", None): Format("<|im_end|>"),
    ("smollm_3", None): Format("<|im_end|>", systems="first"),
    ("smollm_3", "off"): Format("<|im_end|>", systems="first", thoughts="none"),
    ("deepseek_v3_1", None): Format("<｜end▁of▁sentence｜>", thoughts="none"),
    ("deepseek_v3_1", "on"): Format("<｜end▁of▁sentence｜>", thoughts="after", close="</think>"),
}


@functools.cache
def writer(name: str, thinking: Thinking | None) -> Writer:
    return Writer(tokenizer_for((FOLDER / f"{name}.jinja").read_text(encoding="utf-8")), thinking=thinking)


def as_put(form: Format, conversation: str) -> tuple[list[Message], set[str]]:
    """The conversation in the words that the format takes, and what is said of that."""
    messages, told = CONVERSATIONS[conversation], set()
    if conversation == "parts":
        messages = CONVERSATIONS["one turn"]
    if conversation == "two assistant turns" and form.alternates:
        messages, told = [messages[0], answer("Answer one.\n\nAnswer two.")], {notes.JOINED.format("assistant")}
    if conversation == "two user turns" and form.alternates:
        messages = [user("Question one?\n\nQuestion two?"), messages[2]]
        told = {notes.JOINED.format("user")}
    if conversation == "assistant first" and form.alternates:
        messages, told = messages[1:], {notes.LEFT_OUT}
    if conversation == "system" and form.systems == "none":
        messages, told = [user("Be kind.\n\nQuestion one?"), messages[2]], {notes.SYSTEM_MOVED}
    if conversation == "two system turns" and form.systems != "any":
        if form.systems == "none":
            messages, told = [user("Be kind.\n\nBe brief.\n\nQuestion one?"), messages[3]], {notes.SYSTEM_MOVED}
        else:
            messages, told = [system("Be kind.\n\nBe brief."), *messages[2:]], {notes.JOINED.format("system")}
    if conversation == "later system" and form.systems != "any":
        first = messages[:2] if form.systems == "first" else [user("Be kind.\n\nQuestion one?")]
        messages = [*first, messages[2], user("Be brief.\n\nQuestion two?"), messages[5]]
        told = {notes.SYSTEM_MOVED}
    return messages, told


def thought_and_answer(message: Message) -> tuple[str, str]:
    content = message["content"]
    thought, _, rest = content.rpartition("\n</think>\n\n")
    return message.get("reasoning_content") or thought.removeprefix("<think>\n"), rest


def expected(form: Format, message: Message) -> str:
    if message.get("tool_calls"):
        return str(form.calls) + form.stop
    thought, words = thought_and_answer(message)
    if form.thoughts == "inline" and thought:
        return INLINE.replace("Thought {}.", thought).replace("Answer {}.", words) + form.stop
    return (thought + form.close if form.thoughts == "after" else "") + words + form.stop


def read_in_use(form: Format, message: Message) -> Message:
    """An earlier turn as the template is given it in use."""
    if message.get("tool_calls"):
        return {**message, "tool_calls": [{**message["tool_calls"][0], "id": "call00000"}]}
    if message["role"] == "tool":
        return {**message, "tool_call_id": "call00000"}
    if message["role"] != "assistant" or form.thoughts == "after":
        return message  # in the latter case the template itself takes the thought away
    thought, words = thought_and_answer(message)
    if thought and form.thoughts == "inline":
        words = INLINE.replace("Thought {}.", thought).replace("Answer {}.", words)
    return answer(words)


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize(("name", "thinking"), FORMATS)
def test_answers_are_trained_as_the_format_has_them_behind_the_prompts_of_use(
    name: str, thinking: Thinking | None, conversation: str
) -> None:
    form, write, tools = FORMATS[name, thinking], writer(name, thinking), tools_of(conversation)
    example = Chat("row 1", CONVERSATIONS[conversation], tools=tools)
    if conversation in WITH_TOOLS and form.calls is None:
        with pytest.raises(BadRow, match="tool calls, which the model's chat template cannot write"):
            write(example)
        return
    messages, told = as_put(form, conversation)
    turns = [at for at, message in enumerate(messages) if at and message["role"] == "assistant"]
    used = [read_in_use(form, message) for message in messages]
    if conversation == "calls and texts":
        used[1] = {**used[1], "content": ""}
        told.add(notes.TEXT_DROPPED)
    if conversation in WITH_TOOLS:
        told.add(notes.NEW_IDS)
    if conversation in ("thought", "thoughts", "one of two thinks", "inline thoughts"):
        inline = set() if conversation == "inline thoughts" else {notes.THOUGHTS_INLINE}
        left_out = {notes.THOUGHTS_OFF if thinking else notes.THOUGHTS_CLOSED}
        told |= {"inline": inline, "none": left_out, "after": set()}[form.thoughts]
    switches = {} if thinking is None else {"enable_thinking": thinking == "on", "thinking": thinking == "on"}
    drafts = write(example)
    got = [(draft.text[:start], draft.text[start:end]) for draft in drafts for start, end in draft.spans]
    wanted = [
        (
            write.tokenizer.apply_chat_template(
                used[:at], tools=tools, tokenize=False, add_generation_prompt=True, **switches
            ),
            expected(form, messages[at]),
        )
        for at in turns
    ]
    assert got == wanted
    assert {note for draft in drafts for note in draft.notes} == told


def test_what_is_said_of_a_row_is_said_once() -> None:
    turns = [message for _ in range(3) for message in CONVERSATIONS["two user turns"]]
    drafts = writer("mistral_7b", None)(Chat("row 1", turns))
    assert Counter(note for draft in drafts for note in draft.notes) == {notes.JOINED.format("user"): 1}


def test_results_get_the_ids_of_their_calls() -> None:
    calls = [
        {"id": f"toolu_{city}", "type": "function", "function": {"name": "weather", "arguments": {"city": city}}}
        for city in ("Bonn", "Ulm")
    ]
    results = [{"role": "tool", "content": f"{city} 12", "tool_call_id": f"toolu_{city}"} for city in ("Ulm", "Bonn")]
    turns = [user("Weather?"), {"role": "assistant", "content": "", "tool_calls": calls}, *results, answer("Cold.")]
    text = writer("mistral_nemo", None)(Chat("row 1", turns))[-1].text
    for city, name in (("Bonn", "call00000"), ("Ulm", "call00001")):
        assert f'{{"city": "{city}"}}, "id": "{name}"' in text
        assert f'{{"content": {city} 12, "call_id": "{name}"}}' in text
