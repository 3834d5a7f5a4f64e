"""Notices: each trouble is told once by a stream of events that has it, and an ordinary run tells nothing."""

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from halfbyte.generate.batched import Answer
from halfbyte.runs.events import Evaluation, Event, StepMetrics
from halfbyte.runs.metrics import read_events
from halfbyte.train.notices import Notices
from halfbyte.train.samples import Asked, told_trouble, trouble_of

VOCABULARY = 49152
HERE = Path(__file__).parent


def notices(**more: Any) -> Notices:
    return Notices(**{"vocabulary": VOCABULARY, "max_grad_norm": 0.3} | more)


def stream(count: int, **course: Callable[[int], float]) -> list[StepMetrics]:
    """Steps of an ordinary run over one pass, but for what ``course`` says."""
    usual: dict[str, Callable[[int], float]] = {
        "loss": lambda step: 1 + 2 / step, "learning_rate": lambda step: 2e-4, "grad_norm": lambda step: 1.0,
        "tokens_per_second": lambda step: 100 + step % 7, "epoch": lambda step: step / count,
    }  # fmt: skip
    made = usual | course
    return [
        StepMetrics(step=step, trained_tokens=100 * step, elapsed=step, **{name: f(step) for name, f in made.items()})
        for step in range(1, count + 1)
    ]


def said(events: Iterable[Event], **more: Any) -> list[str]:
    notice = notices(**more)
    return [sentence for event in events for sentence in notice(event)]


TROUBLES: dict[str, tuple[list[StepMetrics], str]] = {
    "untrained": (
        stream(60, loss=lambda step: math.log(VOCABULARY) + 0.02 * (step % 3)),
        "ln of the vocabulary (10.80)",
    ),
    "leaking": (
        stream(60, loss=lambda step: 2 if step < 5 else 0.002),
        "0.0020 after 7 steps, on rows that were never",
    ),
    "rising": (stream(80, loss=lambda step: 1 if step < 30 else 6), "training diverges; stop it and take a lower"),
    "rising at once": (
        stream(30, loss=lambda step: [10, 8, 18, 26, 39, 56, 26, 9, 5][min(step, 9) - 1]),  # SmolLM2, a rate of 0.03
        "risen from 12.00 to 26.00: training diverges",
    ),
    "rising, and staying": (stream(60, loss=lambda step: min(1 + step / 2, 4.5)), "risen from 2.00 to 4.50"),
    "clipped": (stream(80, grad_norm=lambda step: 40 + step), "never below 10 times max_grad_norm (0.3)"),
    "standing": (stream(60, learning_rate=lambda step: 2e-4 if step < 9 else 0), "learning rate is 0 since step 9,"),
    "slowed": (
        stream(90, tokens_per_second=lambda step: 100 if step < 60 else 40),
        "half as fast as before since about",
    ),
}


@pytest.mark.parametrize("trouble", TROUBLES)
def test_each_trouble_is_told_once(trouble: str) -> None:
    events, words = TROUBLES[trouble]
    [sentence] = said(events)
    assert words in sentence
    assert sentence.endswith(".") and "\n" not in sentence


@pytest.mark.parametrize("names", [["loss"], ["loss", "perplexity"], ["general_loss"]])
def test_an_evaluation_that_is_no_number_is_told_once(names: list[str]) -> None:
    events = [Evaluation(step=step, figures={"token_accuracy": 0.5}, not_finite=names) for step in (10, 20)]
    [sentence] = said(events)
    assert f"evaluation's {' and '.join(names)} {'is' if len(names) == 1 else 'are'} not finite" in sentence
    assert ("general text" in sentence) == (names == ["general_loss"])
    assert said([event.model_copy(update={"not_finite": []}) for event in events]) == []


def test_a_rising_evaluation_is_told_with_the_step_of_the_best() -> None:
    steps = stream(60, loss=lambda step: 3 / step)
    held_out = {10: 2.0, 20: 1.0, 30: 1.2, 40: 1.3, 50: 1.4}
    events: list[Event] = []
    for step in steps:
        events.append(step)
        if step.step in held_out:
            events.append(Evaluation(step=step.step, figures={"loss": held_out[step.step]}))
    notice, told = notices(), []
    for event in events:
        told += [(getattr(event, "step", 0), sentence) for sentence in notice(event)]
    [(when, sentence)] = told
    assert when == 40 and "best at step 20 (1.000) and has risen to 1.300" in sentence
    both_rise = [e.model_copy(update={"loss": 1 + e.step / 100}) if isinstance(e, StepMetrics) else e for e in events]
    assert said(both_rise) == []  # that is no learning by heart
    assert said([e for e in events if not isinstance(e, Evaluation) or e.step < 40]) == []  # once is no trend


def test_the_quick_start_tells_nothing() -> None:
    """Its rows and model, evaluated every 15 steps on 100 held-out rows: every step is clipped to 0.3."""
    events = read_events(HERE / "ordinary_metrics.jsonl")
    assert sum(isinstance(event, StepMetrics) for event in events) > 50
    assert sum(isinstance(event, Evaluation) for event in events) > 3
    assert said(events) == []


def test_what_is_no_trouble_is_not_told() -> None:
    fresh = math.log(VOCABULARY)
    assert said(stream(60)) == []
    assert said(stream(60, loss=lambda step: fresh * (1 - 0.001 * step))) == []  # a fresh model that learns
    assert (
        said(stream(60, loss=lambda step: 2 if step < 5 else 0.002, epoch=lambda step: step / 4)) == []
    )  # few rows, many passes
    assert said(stream(60, learning_rate=lambda step: 0 if step == 1 else 1e-4)) == []  # a warm-up
    assert said(stream(60, grad_norm=lambda step: 40.0), max_grad_norm=0) == []
    assert said(stream(60, loss=lambda step: 0.001), is_likelihood=False) == []  # of preferences


def test_a_base_in_8_bits_is_not_told_to_take_more_bits() -> None:
    events, _ = TROUBLES["rising"]
    assert "--quant-type int8 or none" in said(events)[0] and "quant-type" not in said(events, in_4_bits=False)[0]


@pytest.fixture
def tokenizer(tiny_model_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model_folder)


def answer(tokenizer: Any, text: str, **more: Any) -> Answer:
    """An answer that ends with its stop token."""
    ids = tokenizer(text)["input_ids"]
    return Answer(**{"ids": (*ids, tokenizer.eos_token_id), "text": text, "is_number": True} | more)


@pytest.mark.parametrize(
    ("text", "trouble"),
    [
        ("", "nothing but special tokens"),
        (" \n", "nothing but blanks"),
        ("aaaaaaaaaaaa", "'a' again and again"),
        ("Paris \N{REPLACEMENT CHARACTER} in France", "U+FFFD"),
        ("Un cafÃ©, s'il vous plaÃ®t", "wrong encoding"),
        ("â€œYesâ€\x9d", "wrong encoding"),
        ("Paris.", None),
        ("Ça va, Âne? État à côté: naïve café", None),
        ("no no no no no no", None),
        ("aaa", None),
        ("half a character \N{REPLACEMENT CHARACTER}", None),  # cut off after max_new_tokens
    ],
)
def test_answers_of_a_broken_model_are_told_from_others(text: str, trouble: str | None, tokenizer: Any) -> None:
    found = trouble_of(answer(tokenizer, text), tokenizer)
    assert found is None if trouble is None else found is not None and trouble in found and "look at" in found


def test_the_first_answer_with_trouble_is_told_with_its_prompt(tokenizer: Any) -> None:
    asked = [Asked("who?", [1]), Asked("why?", [2])]
    good, bad = answer(tokenizer, "me"), answer(tokenizer, "x", is_number=False)
    assert told_trouble(asked, [good, good], tokenizer) is None
    sentence = told_trouble(asked, [good, bad], tokenizer)
    assert sentence is not None and "'why?' with logits that are not numbers" in sentence
