"""``chat``: a conversation in the terminal."""

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from halfbyte.cli.chat_commands import COMMANDS, obey, say
from halfbyte.cli.chat_input import editing, read_message
from halfbyte.cli.chat_screen import Screen, screen_for
from halfbyte.cli.console import fail, notes
from halfbyte.cli.options import (
    Adapters,
    Device,
    FrequencyPenalty,
    Head,
    Kv,
    MaxNewTokens,
    MinP,
    Model,
    PresencePenalty,
    RemoteCode,
    RepetitionPenalty,
    Seed,
    System,
    Temperature,
    TopK,
    TopP,
)
from halfbyte.cli.talk import adapter_of, opened, sampling_of, say_template, system_text
from halfbyte.errors import DecodingError, InputError, counted

if TYPE_CHECKING:
    from halfbyte.generate.dialogue import Dialogue, Reply
    from halfbyte.generate.engine import Engine
    from halfbyte.generate.thoughts import Part, Thoughts

Thinking = Annotated[
    Literal["on", "off", "hide"] | None,
    typer.Option(help="Whether the chat template asks for thoughts; hide: they are not shown, else in grey."),
]
Plain = Annotated[bool, typer.Option("--plain", help="Show answers as they are, not as Markdown.")]


def chat(
    model: Model,
    system: System = None,
    adapter: Adapters = None,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.7,
    top_p: TopP = 0.9,
    top_k: TopK = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    frequency_penalty: FrequencyPenalty = 0.0,
    presence_penalty: PresencePenalty = 0.0,
    seed: Seed = None,
    thinking: Thinking = None,
    plain: Plain = False,
    kv: Kv = None,
    head: Head = None,
    device: Device = "auto",
    trust_remote_code: RemoteCode = False,
) -> None:
    """Talk to a model. /help tells the commands, /quit or Ctrl-D ends, Ctrl-C stops an answer."""
    opening = system_text(system)
    with contextlib.ExitStack() as stack:
        loaded, tokenizer = stack.enter_context(opened(model, seed, trust_remote_code, device, adapter))
        from halfbyte.files import cache_folder
        from halfbyte.generate import check_generates
        from halfbyte.generate.dialogue import Dialogue
        from halfbyte.generate.engines import engine_over

        check_generates(loaded)
        if loaded.config.is_encoder_decoder:
            raise InputError(f"{model} turns one text into another and has no conversation; use generate --prompt.")
        say_template(loaded, tokenizer)
        answering = adapter_of(loaded)
        sampling = sampling_of(
            loaded,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            frequency_penalty=frequency_penalty,
            presence_penalty=presence_penalty,
        )
        engine = stack.enter_context(engine_over(loaded, tokenizer, kv=kv, head=head, keep_decoded=True))
        dialogue = Dialogue(
            engine,
            system=opening,
            sampling=sampling,
            adapter=answering,
            thinking=None if thinking == "hide" else thinking,
            seed=seed,
        )
        stack.enter_context(editing(COMMANDS, cache_folder() / "chat_history"))
        notes.print("Ctrl-C stops an answer; /help tells the commands; /quit or Ctrl-D ends.", style="dim")
        talk = Chat(dialogue, screen_for(plain), shows_thoughts=thinking != "hide")
        if adapter:
            obey(talk, "/adapter")  # says who answers
        talk.talk()


@dataclass(frozen=True)
class Last:
    """What the last answer took.

    Attributes:
        read: tokens of its prompt that were read.
        cached: that were held.
        written: tokens of the answer.
        first_seconds: until its first token.
        rate: tokens a second after the first.
    """

    read: int
    cached: int
    written: int
    first_seconds: float
    rate: float

    @property
    def context(self) -> int:
        """Tokens of prompt and answer."""
        return self.read + self.cached + self.written


class Chat:
    """The loop of question and answer.

    Attributes:
        dialogue: what is asked.
        engine: what answers.
        files: that this chat has written or read.
        unanswered: the last question, where nothing was kept of its answer.
        last: what the last answer took.
        is_over: whether the user wants to end.
    """

    def __init__(self, dialogue: "Dialogue", screen: Screen, *, shows_thoughts: bool) -> None:
        self.dialogue = dialogue
        self.engine: Engine = dialogue.engine
        self.files: set[Path] = set()
        self.unanswered: str | None = None
        self.last: Last | None = None
        self.is_over = False
        self._screen = screen
        self._shows_thoughts = shows_thoughts

    def talk(self) -> None:
        """Go on until the user ends."""
        while not self.is_over and (line := read_message()) is not None:
            try:
                if line.startswith("/") and not line.startswith("//"):
                    obey(self, line)
                elif line:
                    self.answer(line[1:] if line.startswith("//") else line)
            except InputError as error:
                fail(str(error))
            except KeyboardInterrupt:  # between a question and its answer
                say("(stopped)")

    def answer(self, question: str) -> None:
        """Ask something, show the answer, and keep both.

        Raises:
            InputError: it cannot be asked.
        """
        from halfbyte.generate.thoughts import Thoughts

        self.unanswered = question
        reply = self.dialogue.ask(question)
        if reply.dropped:
            say(f"The context is full: {self._dropped(reply)}.")
        parts = Thoughts(reply.tag)
        began, first = time.perf_counter(), 0.0
        remark: str | None = None
        self._screen.begin()
        try:
            for piece in reply.stream:
                first = first or time.perf_counter() - began
                self._show(parts.add(piece.text))
        except KeyboardInterrupt:
            reply.stream.cancel()
            remark = "stopped"
        except DecodingError as error:
            remark = str(error)
        with contextlib.suppress(KeyboardInterrupt):
            self._show(parts.end())
        if reply.stream.finish == "length" and remark is None:
            remark = "cut: the answer may have no more tokens"
        self._screen.end(remark)
        usage, seconds = reply.stream.usage, time.perf_counter() - began - first
        if usage.written:
            rate = (usage.written - 1) / seconds if seconds > 0 else 0.0
            self.last = Last(usage.prompt - usage.cached, usage.cached, usage.written, first, rate)
        if parts.answer or parts.thought:
            self.dialogue.keep(question, parts.answer, parts.thought)
            self.unanswered = None

    def compare(self, question: str, adapters: list[str | None]) -> None:
        """Show what the base and adapters answer, side by side.

        Raises:
            InputError: it cannot be asked.
        """
        from halfbyte.generate.thoughts import Thoughts

        replies = self.dialogue.compare(question, adapters)
        parts = [Thoughts(reply.tag) for reply in replies]
        names = ["base" if name is None else name for name in adapters]
        try:
            going = list(zip(replies, parts, strict=True))
            while going:
                for reply, part in list(going):
                    if (piece := next(reply.stream, None)) is None:
                        going.remove((reply, part))
                        part.end()
                    else:
                        part.add(piece.text)
                self._screen.columns(self._texts(names, parts), is_last=False)
        except KeyboardInterrupt:
            say("(stopped)")
        except DecodingError as error:
            say(str(error))
        finally:
            for reply in replies:
                reply.stream.cancel()
            self._screen.columns(self._texts(names, parts), is_last=True)

    def _texts(self, names: list[str], parts: "list[Thoughts]") -> dict[str, str]:
        return {name: part.answer or part.thought for name, part in zip(names, parts, strict=True)}

    def _show(self, parts: "list[Part]") -> None:
        for is_thought, text in parts:
            if self._shows_thoughts or not is_thought:
                self._screen.add(text, is_thought=is_thought)

    def _dropped(self, reply: "Reply") -> str:
        left = counted(reply.read, "turn")
        return f"the oldest {counted(reply.dropped, 'turn')} are no longer read, {left} before this question are"
