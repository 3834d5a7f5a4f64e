"""A model as lm-eval asks it: likelihoods through our passes, answers through the engine.

Tokens are those of lm-eval's own class for transformers' models (``HFLM``, 0.4.13): contexts with what the tokenizer
puts before them unless they begin with it already, continuations as they follow; texts that are too long lose their
beginning; answers end at the task's stop strings. What differs: the output head is evaluated only where something is
asked for, answers are decoded many at once, each ends at the chat's stop token too, and nothing is printed.
"""

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

from halfbyte.errors import DecodingError, InputError, named
from halfbyte.evaluate.likelihood import Asked, likelihoods
from halfbyte.evaluate.perplexity import losses, prefix_of
from halfbyte.evaluate.sides import computing
from halfbyte.generate.answers import Request
from halfbyte.generate.engine import Engine
from halfbyte.generate.engines import engine_over
from halfbyte.generate.sampling import Sampling

TOGETHER = 256
"""Answers under way or waiting, at most."""
MOST = 256
"""Tokens of an answer, where a task does not say."""
KNOWN = {"until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k", "min_p", "repetition_penalty"}
"""What of a task's ``generation_kwargs`` is done."""
Progress = Callable[[int, int], None]


class HalfbyteLM(TemplateLM):  # type: ignore[misc]
    """A causal language model, with one of its adapters or none.

    Args:
        model: in evaluation mode, its head bound.
        tokenizer: the model's.
        adapter: its active one, or None for the base.
        length: tokens that it reads at most.
        progress: called with the numbers of requests done and in all.
    """

    backend = "causal"

    def __init__(
        self, model: Any, tokenizer: Any, adapter: str | None, length: int, progress: Progress = lambda *_: None
    ) -> None:
        super().__init__()
        self.model, self.tokenizer, self.adapter = model, tokenizer, adapter
        self.max_length = length
        self.progress = progress

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token that a text without a context follows."""
        return prefix_of(self.tokenizer)

    @property
    def tokenizer_name(self) -> str:
        """What caches of requests are told by."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return a text as tokens, with what the tokenizer puts around it, unless it begins with that."""
        options: dict[str, Any] = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        if add_special_tokens is None and string.startswith(self.tokenizer.decode(self.prefix_token_id)):
            options = {"add_special_tokens": False}
        ids: list[int] = self.tokenizer.encode(string, **options)
        return ids

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Write a conversation as a text."""
        text = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return str(text)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return the log-probability of each continuation, and whether it is the greedy one."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        asked = [self._fitting(context, continuation) for _, context, continuation in requests]
        with computing(self.model, self.adapter):
            found = likelihoods(self.model, asked, progress=self.progress)
        return [(one.logprob, one.is_greedy) for one in found]

    def _fitting(self, context: list[int], continuation: list[int]) -> Asked:
        """Cut a text at its beginning, so that all of it but the last token can be read."""
        if len(continuation) > self.max_length:
            raise InputError(
                f"A text to be compared is {len(continuation):,} tokens long, and {self.max_length:,} are read at "
                "most; raise --max-length, or leave that task out."
            )
        whole = (context + continuation)[-(self.max_length + 1) :]
        cut = len(whole) - len(continuation)
        return Asked(tuple(whole[:cut]), tuple(whole[cut:]))

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-probability of each text, read in windows."""
        texts = [self.tok_encode(request.args[0]) for request in requests]
        with computing(self.model, self.adapter):
            found = losses(self.model, texts, self.prefix_token_id, self.max_length, self.progress)
        return [-loss.nats for loss in found]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the answer to each context."""
        made = [self._request(number, *request.args) for number, request in enumerate(requests)]
        answers: list[str] = []
        with engine_over(self.model, self.tokenizer, most_waiting=TOGETHER) as engine:
            for ids in _written(engine, [request for request, _ in made]):
                text = str(self.tokenizer.decode(ids, skip_special_tokens=True))
                for stop in made[len(answers)][1]:
                    text = text.split(stop)[0]
                answers.append(text)
                self.progress(len(answers), len(requests))
        return answers

    def _request(self, number: int, context: str, generation: dict[str, Any]) -> tuple[Request, list[str]]:
        """Return what the engine is asked, and the strings that the answer ends before."""
        unknown = sorted(name for name in generation if name not in {*KNOWN, "max_new_tokens", "max_tokens"})
        if unknown:
            raise InputError(f"A task wants answers with {named(unknown)}, which is not done here; leave it out.")
        options = dict(normalize_gen_kwargs(generation, MOST))
        end = str(self.tokenizer.decode(self.eot_token_id, skip_special_tokens=False))
        stops = [stop for stop in handle_stop_sequences(options["until"], end) if stop]
        most = int(options["max_gen_toks"])
        if most >= self.max_length:
            raise InputError(
                f"A task wants answers of {most:,} tokens, and {self.max_length:,} are read and written at most; raise "
                "--max-length, or leave that task out."
            )
        drawn = {name: options[name] for name in ("temperature", "top_p", "top_k", "min_p") if name in options}
        sampling = Sampling(
            max_new_tokens=most,
            stop=tuple(stops),
            seed=number,
            repetition_penalty=options.get("repetition_penalty", 1.0),
            **(drawn if options["do_sample"] else {}),
        )
        ids = self.tok_encode(context)[-(self.max_length - most) :]
        return Request(tuple(ids), sampling, self.adapter), stops


def _written(engine: Engine, requests: Iterable[Request]) -> Iterator[list[int]]:
    """Yield the tokens of each answer, in order; many are under way at once."""
    rest = iter(requests)
    under_way = deque(engine.submit(request) for request in itertools.islice(rest, TOGETHER))
    while under_way:
        try:
            yield [chosen.token for piece in under_way.popleft() for chosen in piece.chosen]
        except DecodingError as error:
            raise InputError(f"A question of a task got no answer: {error}") from error
        if (request := next(rest, None)) is not None:
            under_way.append(engine.submit(request))
