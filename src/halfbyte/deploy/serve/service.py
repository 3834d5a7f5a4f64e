"""What all requests to a model share: the engine, threads that make tokens, and what a request may ask of them."""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from halfbyte.deploy.serve.catalog import Catalog, Served
from halfbyte.deploy.serve.errors import ApiError, shutting_down, too_many
from halfbyte.deploy.serve.log import Log
from halfbyte.deploy.serve.logprobs import TokenTexts
from halfbyte.deploy.serve.metrics import Metrics
from halfbyte.deploy.serve.options import ServeOptions
from halfbyte.deploy.serve.prompts import Prompts
from halfbyte.deploy.serve.schemas import Asked
from halfbyte.errors import InputError
from halfbyte.generate.answers import Request as Wanted
from halfbyte.generate.answers import Stream
from halfbyte.generate.constraint import Constraint
from halfbyte.generate.engine import Engine
from halfbyte.generate.sampling import Sampling

THREADS = 2
"""That make tokens of requests."""

Result = TypeVar("Result")


@dataclass
class Service:
    """What all requests to a model that generates share.

    Attributes:
        engine: decodes.
        prompts: makes tokens.
        catalog: what may be asked for.
        options: the server's.
        defaults: of sampling, by the model's own generation settings.
        texts: of single tokens.
        base: the base's path, which nobody is told.
    """

    engine: Engine
    prompts: Prompts
    catalog: Catalog
    options: ServeOptions
    defaults: dict[str, Any]
    texts: TokenTexts
    base: str
    log: Log
    metrics: Metrics
    threads: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(THREADS, "halfbyte-prompts"))
    under_way: set[Stream] = field(default_factory=set)
    preparing: int = 0
    is_ending: bool = False

    async def apart(self, work: Callable[[], Result]) -> Result:
        """Do what takes a while in a thread.

        Raises:
            ApiError: as many as may wait do already.
        """
        if self.is_ending:
            raise shutting_down()
        if self.preparing >= self.options.max_waiting + THREADS:
            raise too_many("The server is busy: as many requests as may wait do already. Ask again in a moment.")
        self.preparing += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self.threads, work)
        finally:
            self.preparing -= 1

    def begin(self, wanted: Sequence[Wanted]) -> list[Stream]:
        """Hand requests to the engine, all or none.

        Raises:
            InputError, Busy, Closed: as the engine does.
        """
        if self.is_ending:
            raise shutting_down()
        streams: list[Stream] = []
        try:
            streams.extend(self.engine.submit(one) for one in wanted)
        except BaseException:
            for stream in streams:
                stream.cancel()
            raise
        self.under_way.update(streams)
        return streams

    def end(self, streams: Iterable[Stream]) -> None:
        """End answers that nobody reads any more."""
        for stream in streams:
            stream.cancel()
            self.under_way.discard(stream)

    def stops(self, asked: Asked) -> frozenset[int]:
        """Return the tokens that end an answer and give no text."""
        return self.engine.stops.union(asked.stop_token_ids or ())

    def end_all(self) -> None:
        """End all answers: the server ends."""
        self.is_ending = True
        for stream in list(self.under_way):
            stream.cancel()

    def requests(
        self,
        asked: Asked,
        served: Served,
        prompts: Sequence[tuple[int, ...]],
        most: int,
        logprobs: int | None,
        constraint: Constraint | None = None,
    ) -> list[Wanted]:
        """Return what the engine is asked: ``n`` answers to each prompt, with a seed each.

        Raises:
            ApiError: more than is allowed.
            InputError: a value is out of its range.
        """
        n, options = asked.n or 1, self.options
        if n * len(prompts) > options.max_choices:
            raise ApiError(
                400, f"The request asks for {n * len(prompts)} answers; {options.max_choices} are the most.", param="n"
            )
        if options.max_tokens is not None and most > options.max_tokens:
            raise ApiError(
                400, f"max_tokens is {most}, and the server gives {options.max_tokens} at most.", param="max_tokens"
            )
        for ids in prompts:
            if options.max_prompt_tokens is not None and len(ids) > options.max_prompt_tokens:
                raise ApiError(
                    400,
                    f"The prompt is {len(ids)} tokens long, and the server takes {options.max_prompt_tokens} at most.",
                    code="context_length_exceeded",
                )
        sampling = _sampling(asked, most, logprobs, self.defaults)
        seeds = [None if asked.seed is None else _seed(asked.seed, number) for number in range(n)]
        wanted = [
            Wanted(ids, replace(sampling, seed=seed), served.adapter, constraint) for ids in prompts for seed in seeds
        ]
        for one in wanted:
            self.engine.check(one)
        return wanted


def _seed(seed: int, number: int) -> int:
    """Return the seed of one of several answers; that of the first is the request's."""
    return (seed + number) % 2**64


def _sampling(asked: Asked, most: int, logprobs: int | None, defaults: dict[str, Any]) -> Sampling:
    given = {
        "temperature": 1.0 if asked.temperature is None else asked.temperature,
        "top_p": asked.top_p,
        "top_k": asked.top_k,
        "min_p": asked.min_p,
        "repetition_penalty": asked.repetition_penalty,
        "frequency_penalty": asked.frequency_penalty,
        "presence_penalty": asked.presence_penalty,
    }
    named = defaults | {name: value for name, value in given.items() if value is not None}
    if named.get("top_k") in (0, -1):  # all, as vLLM has it
        del named["top_k"]
    bias = {int(token): value for token, value in (asked.logit_bias or {}).items()}
    return Sampling(
        **named,
        logit_bias=bias,
        max_new_tokens=most,
        stop=asked.stops,
        stop_ids=tuple(asked.stop_token_ids or ()),
        logprobs=logprobs,
    )


def length_of(asked: int | None, default: int, service: Service) -> int:
    """Return how long an answer may become.

    Raises:
        InputError: longer than the model can.
    """
    positions = service.engine.decoder.positions
    if asked is not None and positions is not None and asked > positions:
        raise InputError(f"max_tokens is {asked}, but the model attends to {positions}: lower it.")
    if asked is not None:
        return asked
    return default if service.options.max_tokens is None else min(default, service.options.max_tokens)
