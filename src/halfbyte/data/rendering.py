"""A chat template at work: messages to text, and one sentence for whatever goes wrong in it.

A template is a program from the internet. transformers runs it in Jinja's sandbox: it sees the conversation and nothing
else, and ``range`` ends at 100,000. Loops within loops could still take hours, so the first texts that a template
writes (:meth:`Renderer.trial`) are watched: between two lines of the template its time and memory are looked at, and
the system gives no more memory than that (``'a' * 10 ** 10`` is one line). Left out: a single operation that takes
hours, such as a power of powers, which no line ends.
"""

import contextlib
import sys
import time
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal

from halfbyte.data.examples import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Thinking = Literal["on", "off"]

SECONDS = 5.0
"""Processor time that a trial may take; they take milliseconds."""
MEMORY = 1 << 30
"""Bytes that may come into use during a trial."""

NO_END = "The chat template runs without end, or takes too much memory; take another one (--chat-template)."


class Refused(Exception):
    """A conversation that a chat template cannot write.

    Attributes:
        kind: what is wrong, in a few words that are the same for all such conversations.
    """

    def __init__(self, kind: str, sentence: str) -> None:
        """Make an error that reads ``sentence``: it goes on behind the place of the row and a colon."""
        super().__init__(sentence)
        self.kind = kind


class TooLong(Exception):
    """A trial took more time or memory than it may."""


class Renderer:
    """Writes conversations with one template.

    Args:
        tokenizer: its special tokens are there for the template.
        template: Jinja.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", template: str) -> None:
        from transformers.utils.chat_template_utils import render_jinja_template

        self.tokenizer = tokenizer
        self.template = template
        self._names = tokenizer.special_tokens_map
        self._write = render_jinja_template

    def __call__(
        self, messages: list[Message], tools: list[dict[str, Any]] | None = None, *, prompt: bool = False
    ) -> str:
        """Return the text of a conversation, with ``prompt`` with the generation prompt behind it.

        Raises:
            Refused: the template cannot write it, or what it writes is no text.
        """
        try:
            text = self._render(messages, tools, prompt)
        except RecursionError:
            raise Refused(
                "too many brackets within brackets", "a message has brackets within brackets, too many to be written."
            ) from None
        except TooLong:
            raise
        except Exception as error:  # a template is a program of somebody else's: it can raise anything
            raise Refused(
                "refused by the chat template",
                f"the model's chat template refuses this conversation: {_reason(error)}",
            ) from error
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError:
                raise Refused(
                    "half of a character", "a message holds half of a character (a lone surrogate); remove it."
                ) from None
        return text

    def trial(self, messages: list[Message], tools: list[dict[str, Any]] | None = None, *, prompt: bool = False) -> str:
        """Do the same, watched.

        Raises:
            Refused: likewise.
            TooLong: it would take too long, or too much memory.
        """
        try:
            with _watched(), _bounded():
                return self(messages, tools, prompt=prompt)
        except Refused as error:
            if isinstance(error.__cause__, MemoryError):
                raise TooLong from None
            raise

    def _render(self, messages: list[Message], tools: list[dict[str, Any]] | None, prompt: bool) -> str:
        # As apply_chat_template does it: what is None is left away; that looks up the tokens anew for each text.
        known = [{key: value for key, value in message.items() if value is not None} for message in messages]
        texts, _ = self._write(
            [known], tools=tools, chat_template=self.template, add_generation_prompt=prompt, **self._names
        )
        text: str = texts[0]
        return text


def with_thinking(template: str, thinking: Thinking | None) -> str:
    """Return a template that thinks or does not, unless it is told otherwise: saved with a model, it needs no option.

    The switch is called ``enable_thinking`` by Qwen, GLM, Gemma, Nemotron and SmolLM, ``thinking`` by Granite and
    DeepSeek. The line ends in ``{{ '' }}``, behind which Jinja leaves a newline alone.
    """
    if thinking is None:
        return template
    value = "true" if thinking == "on" else "false"
    switches = (
        f"{{% if {name} is not defined %}}{{% set {name} = {value} %}}{{% endif %}}"
        for name in ("enable_thinking", "thinking")
    )
    return "".join(switches) + "{{ '' }}" + template


def _reason(error: Exception) -> str:
    """Return an error's text as the end of a sentence in one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]}…"


@contextlib.contextmanager
def _watched() -> Iterator[None]:
    """Raise TooLong between two lines of a template, which is Python underneath, once time or memory is up."""
    import psutil

    process = psutil.Process()
    until = time.thread_time() + SECONDS
    most = process.memory_info().rss + MEMORY

    def look(frame: FrameType, _event: str, _argument: object) -> Any:
        if frame.f_code.co_filename != "<template>":
            return None  # Jinja itself, which compiles the template first
        # At each line: a text that is doubled in each takes all memory in thirty.
        if time.thread_time() > until or process.memory_info().rss > most:
            raise TooLong
        return look

    before = sys.gettrace()
    sys.settrace(look)
    try:
        yield
    finally:
        sys.settrace(before)


@contextlib.contextmanager
def _bounded() -> Iterator[None]:
    """Have the system refuse more memory than ``MEMORY``, where it can: a MemoryError is raised then."""
    try:
        import resource
    except ImportError:  # there is none on Windows
        yield
        return
    import psutil

    before, most = resource.getrlimit(resource.RLIMIT_AS)
    bound = psutil.Process().memory_info().vms + MEMORY
    if before != resource.RLIM_INFINITY:
        bound = min(bound, before)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (bound, most))
    except (OSError, ValueError):  # macOS has no such bound
        yield
        return
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (before, most))
