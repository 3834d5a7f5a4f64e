"""A conversation with one engine: its turns, what of them is read, and how answers are drawn.

Each question is read with the turns before it, of which the engine holds what it has read and written
(``keep_decoded`` of :func:`halfbyte.generate.decoders.decoder_for`), so that a further turn costs what is new in it.

A context that is full loses its oldest turns. They go until a quarter of it is free, not one by one: what follows a
turn that went has to be read again, and so that happens once in many turns. They stay in ``messages``.
"""

import random
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace

from halfbyte.data.rendering import Thinking
from halfbyte.errors import InputError
from halfbyte.generate.answers import Request, Stream
from halfbyte.generate.conversation import Message, encoder_of
from halfbyte.generate.engine import Engine
from halfbyte.generate.sampling import Sampling
from halfbyte.generate.thoughts import opened_by

MOST = 1 << 24
"""Tokens beyond which nobody looks for what fits into memory."""
TAIL = 16
"""Tokens of a prompt among which it may open a thought."""


@dataclass(frozen=True)
class Reply:
    """An answer under way.

    Attributes:
        stream: of the engine.
        tag: what its thought was opened with by the prompt, or None.
        dropped: turns that were dropped for it just now.
        read: turns that stand before its question and are read, the system prompt not among them.
    """

    stream: Stream
    tag: str | None
    dropped: int
    read: int


class Dialogue:
    """See the head of this file.

    Args:
        engine: answers.
        system: the system prompt, or None.
        sampling: how answers are drawn.
        adapter: which adapter answers, or None for the base.
        thinking: what the chat template is told of thoughts.
        seed: of the seeds that each answer gets; None: other ones each time.

    Attributes:
        messages: all turns but the system prompt.
        first: how many of them are no longer read.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        system: str | None = None,
        sampling: Sampling | None = None,
        adapter: str | None = None,
        thinking: Thinking | None = None,
        seed: int | None = None,
    ) -> None:
        self.engine = engine
        self.system = system
        self.sampling = sampling or Sampling()
        self.adapter = adapter
        self.messages: list[Message] = []
        self.first = 0
        self._encode = encoder_of(engine.tokenizer, thinking=thinking)
        self.seeded(seed)

    @property
    def most(self) -> int | None:
        """The most tokens of prompt and answer together, by the model and by memory; None: no limit."""
        decoder, limits = self.engine.decoder, []
        if decoder.positions is not None:
            limits.append(decoder.positions)
        if self.engine.memory is not None:
            fitting = bisect_right(range(MOST), self.engine.memory, key=decoder.bytes_of) - 1
            limits.append(fitting)
        return min(limits, default=None)

    def seeded(self, seed: int | None) -> None:
        """Draw the seeds of answers from ``seed`` on."""
        self.seed = seed
        self._random = random.Random(seed)

    def ask(self, question: str) -> Reply:
        """Ask something. Nothing is kept of it but turns that had to be dropped: see :meth:`keep`.

        Raises:
            InputError: it cannot be asked: it is too long by itself, or the chat template refuses it.
        """
        return self._ask(question, self.adapter)

    def compare(self, question: str, adapters: Sequence[str | None]) -> list[Reply]:
        """Ask several adapters the same, at once and with one seed; nothing is kept.

        Raises:
            InputError: as :meth:`ask`.
        """
        seed = self._random.getrandbits(63)
        replies: list[Reply] = []
        try:
            for adapter in adapters:
                replies.append(self._ask(question, adapter, seed))
        except BaseException:
            for reply in replies:
                reply.stream.cancel()
            raise
        return replies

    def keep(self, question: str, answer: str, thought: str = "") -> None:
        """Make a question and its answer turns of the conversation."""
        said: Message = {"role": "assistant", "content": answer}
        if thought.strip():
            said["reasoning_content"] = thought.strip("\n")
        self.messages += [{"role": "user", "content": question}, said]

    def undo(self) -> str | None:
        """Forget the last question and what follows it; return the question, or None where there is none."""
        asked = [place for place, turn in enumerate(self.messages) if turn["role"] == "user"]
        if not asked:
            return None
        question = str(self.messages[asked[-1]]["content"])
        del self.messages[asked[-1] :]
        self.first = min(self.first, len(self.messages))
        return question

    def reset(self) -> None:
        """Forget all turns but the system prompt."""
        self.messages, self.first = [], 0

    def load(self, messages: Sequence[Message]) -> None:
        """Go on with other turns; a system prompt among them becomes the conversation's."""
        turns = list(messages)
        systems = [turn for turn in turns if turn["role"] == "system"]
        self.system = "\n\n".join(str(turn["content"]) for turn in systems) or self.system
        self.messages, self.first = [turn for turn in turns if turn["role"] != "system"], 0

    def whole(self) -> list[Message]:
        """Return all turns, the system prompt first."""
        return [*self._opening(), *self.messages]

    def _opening(self) -> list[Message]:
        return [] if self.system is None else [{"role": "system", "content": self.system}]

    def _ask(self, question: str, adapter: str | None, seed: int | None = None) -> Reply:
        asked: Message = {"role": "user", "content": question}
        ids, dropped = self._fitted(asked)
        most = self.most
        room = self.sampling.max_new_tokens if most is None else max(1, most - len(ids))
        sampling = replace(
            self.sampling,
            max_new_tokens=min(self.sampling.max_new_tokens, room),
            seed=self._random.getrandbits(63) if seed is None else seed,
        )
        tail = str(self.engine.tokenizer.decode(ids[-TAIL:]))
        stream = self.engine.submit(Request(tuple(ids), sampling, adapter))
        return Reply(stream, opened_by(tail), dropped, len(self.messages) - self.first)

    def _fitted(self, asked: Message) -> tuple[list[int], int]:
        """Return the prompt's tokens and how many turns were dropped, so that it leaves room for an answer."""
        most, first = self.most, self.first
        ids = self._encoded(asked)
        if most is None:
            return ids, 0
        wanted = self.sampling.max_new_tokens
        if len(ids) + min(wanted, most // 8) <= most:
            return ids, 0
        try:
            while len(ids) + min(wanted, most // 4) > most and self.first < len(self.messages):
                following = range(self.first + 1, len(self.messages))
                users = (place for place in following if self.messages[place]["role"] == "user")
                self.first = next(users, len(self.messages))
                ids = self._encoded(asked)
            if len(ids) >= most:
                limit = "the model attends to" if most == self.engine.decoder.positions else "there is memory for"
                raise InputError(f"The question alone is {len(ids):,} tokens long, but {limit} {most:,}: shorten it.")
        except BaseException:
            self.first = first
            raise
        return ids, self.first - first

    def _encoded(self, asked: Message) -> list[int]:
        text = str(asked["content"])
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"The question is not UTF-8 text: {text[error.start : error.end]!r} is no character."
            ) from None
        return self._encode([*self._opening(), *self.messages[self.first :], asked])
