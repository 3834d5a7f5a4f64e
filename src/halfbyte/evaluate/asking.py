"""How rows are put to a model: as the requests of an engine, the chat template learnt once."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from halfbyte.data.examples import BadRow
from halfbyte.data.prompts import Asked
from halfbyte.data.rendering import Thinking
from halfbyte.generate.answers import Request
from halfbyte.generate.constraint import Constraint
from halfbyte.generate.conversation import encode, encode_source, encoder_of
from halfbyte.generate.sampling import Sampling


@dataclass(frozen=True)
class Asking:
    """What decides the requests.

    Attributes:
        sampling: how answers are drawn.
        adapter: that answers, or None for the base.
        constraint: what they follow.
        system: the system prompt, for rows without one.
        raw: whether prompts are gone on with as they stand.
        thinking: what the chat template is told of thoughts.
    """

    sampling: Sampling
    adapter: str | None = None
    constraint: Constraint | None = None
    system: str | None = None
    raw: bool = False
    thinking: Thinking | None = None

    def request(self, tokenizer: Any, model: Any, prompt: Any) -> Request:
        """Return the request of one prompt: a text to go on with, or turns.

        Raises:
            InputError: it cannot be written.
        """
        if model.config.is_encoder_decoder:
            return self._request(encode_source(prompt, tokenizer))
        return self._request(encode(prompt, tokenizer, thinking=self.thinking))

    def requests(self, tokenizer: Any, model: Any) -> Callable[[Asked], Request]:
        """Return what makes a request of a row, or raises an ``InputError``."""
        reads_apart = model.config.is_encoder_decoder
        bare = self.raw or (not tokenizer.chat_template and self.system is None)
        encoded = None if reads_apart else encoder_of(tokenizer, thinking=self.thinking)

        def request(asked: Asked) -> Request:
            if encoded is None:
                return self._request(encode_source(self._turns(asked), tokenizer))
            if bare and isinstance(asked.prompt, str):
                return self._request(encode(asked.prompt, tokenizer))
            if self.raw:
                raise BadRow(asked.where, "no text", "is a conversation, but --raw goes on with texts; leave it out.")
            return self._request(encoded(self._turns(asked), asked.tools))

        return request

    def _turns(self, asked: Asked) -> list[dict[str, Any]]:
        has_own = any(turn["role"] == "system" for turn in asked.turns)
        own = [] if self.system is None or has_own else [{"role": "system", "content": self.system}]
        return [*own, *asked.turns]

    def _request(self, ids: list[int]) -> Request:
        return Request(tuple(ids), self.sampling, self.adapter, self.constraint)
