"""What a chat template takes and how it writes, found by having it write conversations of made-up words.

Nothing is known about any model here. Whether a template takes a system turn, two turns of one role in a row, thoughts
or tool calls shows in what becomes of such a conversation: it must not be refused, every word of it must be in the
text, and each answer must follow the text that generation starts from (:meth:`Dialect.turn`). Each is tried when the
first row needs it.

An answer begins where the generation prompt ends. Most templates write exactly that prompt before an answer; those of
thinking models may not: DeepSeek-R1's prompt opens a thought (``<think>``) that is stripped from a written answer, and
Nemotron's opens one where a plain answer is written with ``<think></think>``. In use the model sees the prompt, so the
row shows the prompt, and an answer without a thought begins by closing it.
"""

import functools
import itertools
import re
from typing import Any, Literal

from halfbyte.data.examples import Message
from halfbyte.data.messages import Calls, call_id, holds, split_thought, text_of, with_thought, words_of
from halfbyte.data.rendering import NO_END, Refused, Renderer, Thinking, TooLong
from halfbyte.data.trials import ABOUT, RESULT, SCHEMA, THOUGHT, TOOL, TRIALS, VALUE, WORDS, calling
from halfbyte.errors import InputError

Thoughts = Literal["written", "opened", "closed", "inline", "lost"]
"""What a template does with an assistant's thought: writes it behind the prompt; has a prompt that opens it, but does
not write it; has a prompt that says there is none; knows none, but keeps ``<think>...</think>`` in the answer's text;
drops that too."""

_OPEN = re.compile(r"([<\[])((?:think|thought|reason)\w*)([>\]])\s*\Z", re.IGNORECASE)
_CLOSED = re.compile(r"[<\[]/(?:think|thought|reason)\w*[>\]]\s*\Z", re.IGNORECASE)
"""How a generation prompt ends that opens a thought, or says that there is none."""


class Dialect:
    """One template's ways.

    Args:
        render: writes with the template.
        thinking: whether it was told to think.
        eos: the tokenizer's end-of-sequence token, for a template that closes answers with none.

    Raises:
        InputError: the template cannot write even a question and its answer.
    """

    def __init__(self, render: Renderer, thinking: Thinking | None, eos: str | None) -> None:
        self.render = render
        self.thinking = thinking
        self.eos = eos
        added = render.tokenizer.added_tokens_decoder.values()
        # A tag such as </tool_call> closes something within an answer, not the answer.
        self._stops = [
            token.content for token in added if token.content.strip() and (token.special or token.content[:2] != "</")
        ]
        self._called = Calls(False, "", False)
        self._call_endings: dict[Calls, tuple[str, str]] = {}
        self._taken: dict[str, bool] = {}
        self.parts = False
        """Whether contents are lists of parts."""
        self._learn_contents()
        self._check_thinking()

    def takes(self, what: str) -> bool:
        """Tell whether the template can write conversations that have one of ``TRIALS``."""
        if what not in self._taken:
            self._taken[what] = self._can_write(self._conversation(TRIALS[what]))
        return self._taken[what]

    def content(self, text: str) -> Any:
        """Return a text as the template takes it."""
        return [{"type": "text", "text": text}] if self.parts else text

    def turn(self, messages: list[Message], tools: list[dict[str, Any]] | None = None) -> tuple[str, str]:
        """Return the prompt for the last message, and that message with its stop token, as the model writes it.

        Raises:
            Refused: the template refuses the conversation, or does not write the answer behind the prompt.
        """
        return self.after(self.render(messages[:-1], tools, prompt=True), messages, tools)

    def after(self, prompt: str, messages: list[Message], tools: list[dict[str, Any]] | None = None) -> tuple[str, str]:
        """Do the same behind a prompt that has been written."""
        cut, stop = self._call_ending(self._called) if messages[-1].get("tool_calls") else self.ending
        text = self.render(messages, tools)
        if not text.startswith(prompt) and "strftime_now" in self.render.template:
            prompt = self.render(messages[:-1], tools, prompt=True)  # it may have become midnight
        body = text[len(prompt) :] if text.startswith(prompt) else self._opened(prompt, messages, tools)
        if not body.endswith(cut):
            raise _not_so(prompt)
        return prompt, body[: len(body) - len(cut)] + stop

    def _opened(self, prompt: str, messages: list[Message], tools: list[dict[str, Any]] | None) -> str:
        """Return what follows a prompt that opens more than the template writes before this message."""
        *before, message = messages
        if self.thoughts == "written" and not message.get("reasoning_content"):
            text = self.render([*before, {**message, "reasoning_content": THOUGHT}], tools)
            if text.startswith(prompt + THOUGHT):
                return text[len(prompt) + len(THOUGHT) :]  # as with a thought of no words
        opening, closed = self.opening
        if not opening or not prompt.endswith(opening):
            return self._behind_another_past(prompt, messages, tools)
        thought, answer = split_thought(text_of(message))
        text = self.render([*before, {**message, "content": self.content(answer)}], tools)
        head = prompt[: -len(opening)]
        if not text.startswith(head):
            raise _not_so(prompt)
        tag = _OPEN.search(opening)
        words = (message.get("reasoning_content") or "").strip("\n")
        if not tag:
            lead = ""
        elif closed:
            lead = thought.rpartition("</think>")[0].strip("\n") or words
        else:
            lead = thought or f"{words}\n{tag[1]}/{tag[2]}{tag[3]}\n\n"
        return lead + text[len(head) :]

    def _behind_another_past(self, prompt: str, messages: list[Message], tools: list[dict[str, Any]] | None) -> str:
        """Return what follows the generation prompt where the answer changes how the past before it is written.

        gpt-oss drops a thought beside a tool call once there is an answer, which there is not in use.
        """
        *before, message = messages
        opening = prompt[shared(prompt, self.render(before, tools)) :]
        text = self.render(messages, tools)
        other = {**message, "content": self.content(WORDS[0] + text_of(message))}
        if message.get("reasoning_content"):
            other["reasoning_content"] = WORDS[0] + message["reasoning_content"]
        past = text[: shared(text, self.render([*before, other], tools))].rpartition(opening)[0] if opening else ""
        if not past or not all(holds(past, word) for word in words_of(before[-1])):
            raise _not_so(prompt)
        return text[len(past) + len(opening) :]

    @functools.cached_property
    def opening(self) -> tuple[str, bool]:
        """What the generation prompt opens that is not written before a plain answer, and whether its end is."""
        question, answer = self._conversation(("user", "assistant"))
        prompt, text = self.render([question], prompt=True), self.render([question, answer])
        tag = _OPEN.search(prompt)
        if tag and text.startswith(f"{prompt[: tag.start()]}{tag[1]}/{tag[2]}{tag[3]}"):
            return prompt[tag.start() :], True
        head = shared(prompt, text)
        return (prompt[head:] if text[head:].lstrip().startswith(text_of(answer)) else ""), False

    @functools.cached_property
    def thoughts(self) -> Thoughts:
        """What becomes of an assistant's thoughts."""
        question, answer = self._conversation(("user", "assistant"))
        prompt = self.render([question], prompt=True)

        def written(message: Message) -> str:
            try:
                return self.render([question, message])
            except Refused:
                return ""

        own = written({**answer, "reasoning_content": THOUGHT})
        if THOUGHT in own and own.startswith(prompt):
            return "written"
        if _OPEN.search(prompt):
            return "opened"
        if THOUGHT in own or _CLOSED.search(prompt):
            return "closed"
        inline = written({**answer, "content": self.content(with_thought(THOUGHT, text_of(answer)))})
        return "inline" if THOUGHT in inline and inline.startswith(prompt) else "lost"

    @functools.cached_property
    def appends(self) -> bool:
        """Whether an answer stands in a longer conversation as it does at the end of one."""
        messages = self._conversation(("user", "assistant") * 2)
        try:
            first, second = (self.turn(messages[:length]) for length in (2, 4))
        except Refused:
            return False
        return second[0].startswith("".join(first))

    @functools.cached_property
    def ending(self) -> tuple[str, str]:
        """What is to be cut off behind an answer, and the stop that is put there instead.

        Raises:
            InputError: nothing stops an answer.
        """
        question, answer = self._conversation(("user", "assistant"))
        one, other = (self.render([question, {**answer, "content": self.content(word)}]) for word in ("yes", "no"))
        # A template that always asks for the next answer (Llama 3's first) does so behind this one too.
        always = self.render([question]) == self.render([question], prompt=True)
        tail, length = self._tail(one, other, first=always)
        return (tail[length:], "") if length else (tail, self._end())

    @functools.cached_property
    def frame(self) -> tuple[str, str]:
        """What the template writes between the prompt and a plain answer, and its stop behind that.

        Raises:
            Refused: it does not write the answer there.
        """
        question, answer = self._conversation(("user", "assistant"))
        _, text = self.turn([question, answer])
        lead, _, stop = text.partition(text_of(answer))
        return lead, stop

    def _call_ending(self, calls: Calls) -> tuple[str, str]:
        """The same behind a message that calls tools."""
        if calls not in self._call_endings:
            question = self._conversation(("user",))
            one, other = (self.render([*question, calling(value, calls)]) for value in (VALUE, VALUE[::-1]))
            tail, length = self._tail(one, other)
            self._call_endings[calls] = (tail[length:], "") if length else (tail[len(tail.rstrip()) :], self._end())
        return self._call_endings[calls]

    @functools.cached_property
    def calls(self) -> Calls | None:
        """How the template takes tool calls and their results, if it does."""
        for with_ids, as_text, content in itertools.product((False, True), (False, True), ("", None)):
            self._called = Calls(as_text, content, with_ids)
            if self._can_write(self._calling()):
                return self._called
        return None

    @functools.cached_property
    def takes_text_beside_calls(self) -> bool:
        """Whether a message with tool calls may say something too."""
        return self._can_write(self._calling(self.content(WORDS[-1])))

    def _calling(self, text: Any = None) -> list[Message]:
        question, answer = self._conversation(("user", "assistant"))
        call = calling(VALUE, self._called)
        result = {"role": "tool", "name": TOOL, "content": self.content(RESULT)}
        if self._called.with_ids:
            result["tool_call_id"] = call_id(0)
        return [question, {**call, "content": text} if text else call, result, answer]

    @functools.cached_property
    def takes_tools(self) -> bool:
        """Whether the template tells the model which tools there are."""
        try:
            return ABOUT in self.render(self._conversation(("user",)), [SCHEMA], prompt=True)
        except Refused:
            return False

    def _tail(self, one: str, other: str, *, first: bool = False) -> tuple[str, int]:
        """Return the end that two texts have in common, and where the last stop token in it ends (0: there is none).

        With ``first``, where the first one ends.
        """
        tail = one[len(one) - shared(one[::-1], other[::-1]) :]
        if first:
            ends = [tail.find(token) + len(token) for token in self._stops if token in tail]
            return tail, min(ends, default=0)
        ends = [tail.rfind(token) + len(token) for token in self._stops if token in tail]
        return tail, max(ends, default=0)

    def _end(self) -> str:
        if self.eos is None:
            raise InputError(
                "The tokenizer has no end-of-sequence token, so the model would never learn to stop; "
                "set eos_token in its tokenizer_config.json."
            )
        return self.eos

    def _learn_contents(self) -> None:
        """Find out whether contents are texts or lists of parts."""
        try:
            refused: Refused | None = None
            for self.parts in (False, True):
                question, answer = self._conversation(("user", "assistant"))
                try:
                    text = self.render.trial([question, answer])
                    self.render.trial([question], prompt=True)
                except Refused as error:
                    refused = refused or error
                    continue
                if text_of(question) in text and text_of(answer) in text:
                    self.turn([question, answer])
                    return
        except TooLong:
            raise InputError(NO_END) from None
        except Refused as error:
            refused = error
        raise InputError(
            f"The chat template cannot write a question and its answer: {refused}"
            if refused
            else "The chat template leaves away the question or its answer; take another one (--chat-template)."
        )

    def _check_thinking(self) -> None:
        """Refuse a wish that this template cannot fulfil."""
        if self.thinking is None:
            return
        question = self._conversation(("user",))
        prompt = self.render(question, prompt=True)
        if self.thinking == "off" and _OPEN.search(prompt):
            raise InputError(
                f"With this chat template every answer begins with a thought ({prompt[-20:]!r}), so thinking cannot be "
                "off; leave the option away, or take another template (--chat-template)."
            )
        if self.thinking == "on" and self.thoughts in ("closed", "lost"):
            raise InputError(
                "This chat template has no place for thoughts, so thinking cannot be on; leave the option away, or "
                "take another template (--chat-template)."
            )

    def _can_write(self, messages: list[Message]) -> bool:
        """Tell whether all of a trial is in the text, and each answer follows its prompt."""
        try:
            texts = [self.render(messages)]
            for index, message in enumerate(messages):
                if index and message["role"] == "assistant":
                    texts.append("".join(self.turn(messages[: index + 1])))
        except (Refused, InputError):
            return False
        return all(
            any(word in text for text in (texts if message["role"] == "assistant" else texts[:1]))
            for message in messages
            for word in words_of(message)
        )

    def _conversation(self, roles: tuple[str, ...]) -> list[Message]:
        return [{"role": role, "content": self.content(word)} for role, word in zip(roles, WORDS, strict=False)]


def shared(one: str, other: str) -> int:
    """Return the length of the longest common prefix."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(one), len(other)))


def _not_so(prompt: str) -> Refused:
    return Refused(
        "not written behind the generation prompt",
        f"the model's chat template asks for an answer with {prompt[-40:]!r}, but does not write this answer so; "
        "change the row, or take another template (--chat-template).",
    )
