"""What an output head in int8 or nf4, and keys and values in int8, cost in quality, by halfbyte's own decoder.

    perplexity    exp of the mean −log P(t | t₁ … tᵢ₋₁) over the general text that comes with halfbyte, its passages as
                  the rows of a step, every token of them decoded rather than read
    agreement     the share of tokens of greedy answers of the model as loaded that are the first choice, too, where
                  head or cache are others, behind the same tokens before

An answer of the model as loaded that begins differently goes on differently, so each token is judged behind the model's
own; where the two best logits lie as near as rounding, any change of the arithmetic may choose the other.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from rich.table import Table
from torch import Tensor

from halfbyte.bench.process import cpu_only, model_folder
from halfbyte.bench.report import Circumstances
from halfbyte.bench.run import circumstances, forced
from halfbyte.errors import InputError
from halfbyte.evaluate.texts import general_texts
from halfbyte.files import write_text
from halfbyte.generate.conversation import encode
from halfbyte.generate.decoder import PIECE
from halfbyte.generate.decoders import decoder_for
from halfbyte.generate.native_decoder import NativeDecoder

HEADS = (None, "int8", "nf4")
CACHES = (None, "int8")
NEEDED = 0.995
"""The agreement from which on a kind would do as a default."""
ANSWER = 48
LONGEST = 256
"""Tokens of a passage that are taken, at most."""
PROMPTS = (
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "Is this review positive or negative? The plot drags, but the actors are a joy to watch.",
    "Explain in two sentences how a refrigerator works.",
    "Give me three tips for learning a new language.",
    "Write a Python function that returns the n-th Fibonacci number.",
    "Who wrote Pride and Prejudice?",
    "Translate into French: Good morning, how are you?",
    "A train goes 60 miles an hour for two hours and a half. How far does it come?",
    "Summarize: The meeting was moved to Friday, since half of the team is ill.",
    "What should I cook with rice, eggs and spinach?",
    "Name the planets of the solar system.",
    "Write an e-mail that asks a customer for patience with a late delivery.",
    "Why is the sky blue?",
    "What is the difference between a virus and a bacterium?",
    "Begin a story with the words: It was the last night of summer.",
)


class Kind(BaseModel):
    """One head and cache.

    Attributes:
        head, cache: what they are in; None as they are.
        perplexity: on the general text.
        agreement: with the greedy answers of the model as loaded, 0 to 1.
        page_bytes: of keys and values of 64 positions.
    """

    head: str | None
    cache: str | None
    perplexity: float
    agreement: float
    page_bytes: int


class AgreementReport(BaseModel):
    """What was found.

    Attributes:
        model: its name.
        tokens: of the general text.
        answers: tokens of all greedy answers.
        kinds: the first one is the model as loaded.
    """

    circumstances: Circumstances
    model: str
    tokens: int
    answers: int
    kinds: list[Kind]

    def write(self, file: Path) -> None:
        """Write all of it as JSON."""
        write_text(file, self.model_dump_json(indent=1) + "\n")

    def table(self) -> Table:
        """Return the kinds for the terminal."""
        table = Table(
            title=f"{self.model}, {self.circumstances.title}",
            caption=(
                f"perplexity: of {self.tokens:,} tokens of general text. agreement: of {self.answers:,} tokens of "
                f"greedy answers; {NEEDED:.1%} would do for a default."
            ),
        )
        for column in ("head", "keys and values"):
            table.add_column(column)
        for column in ("perplexity", "agreement", "cache a token"):
            table.add_column(column, justify="right")
        for kind in self.kinds:
            table.add_row(
                kind.head or "as it is",
                kind.cache or "as they are",
                f"{kind.perplexity:.3f}",
                f"{kind.agreement:.2%}",
                f"{kind.page_bytes / 64 / 1024:.1f} KiB",
            )
        return table


def bench_agreement(
    model: str,
    *,
    answer: int = ANSWER,
    threads: int | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> AgreementReport:
    """Measure every head with every cache.

    Args:
        model: folder or hub id of a model, or a name of :data:`halfbyte.bench.shapes.SHAPES`.
        answer: tokens of each greedy answer.
        threads: None takes torch's number.
        progress: is told what happens.

    Raises:
        InputError: there is no such model, or it decodes through transformers.
    """
    from halfbyte.hf import load, load_tokenizer

    with forced(None, threads), cpu_only(), model_folder(model, progress) as folder:
        found = circumstances("")
        loaded: Any = load(folder, device="cpu").eval()
        tokenizer = load_tokenizer(folder)
        texts = [tokenizer(text.text)["input_ids"][:LONGEST] for text in general_texts()]
        prompts = [encode([{"role": "user", "content": prompt}], tokenizer) for prompt in PROMPTS]
        answers: list[list[int]] = []
        kinds = []
        for head in HEADS:
            for cache in CACHES:
                progress(f"head {head or 'as it is'}, keys and values {cache or 'as they are'}")
                decoder = decoder_for(loaded, head=head, cache=cache)
                if not isinstance(decoder, NativeDecoder):
                    raise InputError(f"{model} decodes through transformers ({decoder.reason}), which has one kind.")
                answers = answers or greedy(decoder, prompts, answer)
                kinds.append(
                    Kind(
                        head=head,
                        cache=cache,
                        perplexity=perplexity(decoder, texts),
                        agreement=agreement(decoder, prompts, answers),
                        page_bytes=decoder.paged.decoder.page_bytes,
                    )
                )
    return AgreementReport(
        circumstances=found,
        model=Path(model).name,
        tokens=sum(len(text) - 1 for text in texts),
        answers=sum(map(len, answers)),
        kinds=kinds,
    )


def perplexity(decoder: NativeDecoder, texts: Sequence[Sequence[int]]) -> float:
    """Return exp of the mean negative log-likelihood of the tokens of ``texts`` but the first of each, in nats."""
    total, count = 0.0, 0
    for first in range(0, len(texts), decoder.rows):
        rows = [(decoder.begin(text, None), text) for text in texts[first : first + decoder.rows]]
        for place in range(max(len(text) for _, text in rows) - 1):
            going = [(sequence, text) for sequence, text in rows if place + 1 < len(text)]
            logits = decoder.step([sequence for sequence, _ in going], [text[place] for _, text in going])
            following = torch.tensor([text[place + 1] for _, text in going])
            total -= float(logits.log_softmax(-1).gather(1, following[:, None]).double().sum())
            count += len(going)
        for sequence, _ in rows:
            decoder.end(sequence)
    return math.exp(total / count)


def greedy(decoder: NativeDecoder, prompts: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
    """Return the first ``tokens`` tokens of each greedy answer; none of them ends one."""
    return _behind(decoder, prompts, tokens, None)


def agreement(decoder: NativeDecoder, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> float:
    """Return the share of the answers' tokens that ``decoder`` puts first, behind those before them."""
    own = _behind(decoder, prompts, len(answers[0]), answers)
    same = [a == b for ours, theirs in zip(own, answers, strict=True) for a, b in zip(ours, theirs, strict=True)]
    return sum(same) / len(same)


def _behind(
    decoder: NativeDecoder, prompts: Sequence[Sequence[int]], tokens: int, given: Sequence[Sequence[int]] | None
) -> list[list[int]]:
    """Return the first choices behind the prompts, each behind the choices before it, or behind ``given`` ones."""
    sequences, found = [], []
    for prompt in prompts:
        sequence = decoder.begin(prompt, None)
        while sequence.length < len(prompt) - 1:  # the last token is decoded, so that the head counts
            end = min(len(prompt) - 1, (sequence.length // PIECE + 1) * PIECE)
            decoder.read(sequence, prompt[sequence.length : end])
        sequences.append(sequence)
        found.append([_first(decoder.step([sequence], [prompt[-1]])[0])])
    for place in range(tokens - 1):
        following = [row[place] for row in given or found]
        for row, logits in zip(found, decoder.step(sequences, following), strict=True):
            row.append(_first(logits))
    for sequence in sequences:
        decoder.end(sequence)
    return found


def _first(logits: Tensor) -> int:
    return int(logits.argmax())
