"""Likelihoods and perplexities against a plain loop over single texts and tokens, and against lm-eval's windows."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from halfbyte.errors import InputError
from halfbyte.evaluate import likelihood
from halfbyte.evaluate.likelihood import Asked, likelihoods
from halfbyte.evaluate.perplexity import Loss, losses, metrics_of, prefix_of, windows
from halfbyte.hf.layers.head import bind_head


@pytest.fixture(scope="module")
def model(tiny_model_folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32).eval()


def drawn(count: int, seed: int) -> list[Asked]:
    """Texts of 1 to 40 tokens that go on with 1 to 5; every third shares all but its last token with the one before."""
    draw = torch.Generator().manual_seed(seed)

    def tokens(low: int, high: int) -> tuple[int, ...]:
        length = int(torch.randint(low, high, (1,), generator=draw))
        return tuple(torch.randint(0, 250, (length,), generator=draw).tolist())

    found: list[Asked] = []
    for number in range(count):
        if number % 3 == 2:
            before = found[-1]
            found.append(Asked(before.context, (*before.continuation[:-1], *tokens(1, 2))))
        else:
            found.append(Asked(tokens(1, 41), tokens(1, 6)))
    return found


@torch.no_grad()
def one_by_one(model: Any, asked: Asked) -> tuple[float, bool]:
    total, is_greedy = 0.0, True
    for place, token in enumerate(asked.continuation):
        ids = [*asked.context, *asked.continuation[:place]]
        logprobs = model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        total += logprobs[token].item()
        is_greedy &= int(logprobs.argmax()) == token
    return total, is_greedy


@pytest.mark.parametrize(("together", "logits"), [(1, 1 << 26), (64, 1 << 26), (2048, 1 << 26), (2048, 3000)])
def test_likelihoods_are_those_of_single_texts_whatever_is_read_together(
    model: Any, together: int, logits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(likelihood, "LOGITS", logits)
    asked = drawn(30, seed=together)
    seen: list[tuple[int, int]] = []
    found = likelihoods(model, asked, together=together, progress=lambda done, total: seen.append((done, total)))
    for one, text in zip(found, asked, strict=True):
        logprob, is_greedy = one_by_one(model, text)
        assert one.logprob == pytest.approx(logprob, abs=2e-4) and one.is_greedy == is_greedy
    assert seen[-1] == (30, 30) and seen == sorted(seen)


@torch.no_grad()
def test_a_greedy_answer_is_told(model: Any) -> None:
    ids = [5, 6, 7]
    for _ in range(4):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    other = [*ids[:-1], (ids[-1] + 1) % 200]
    found = likelihoods(model, [Asked((5, 6, 7), tuple(ids[3:])), Asked((5, 6, 7), tuple(other[3:]))])
    assert [one.is_greedy for one in found] == [True, False]


def test_texts_that_differ_in_their_last_token_share_a_pass(model: Any) -> None:
    passes = []
    hook = model.register_forward_pre_hook(
        lambda _, __, given: passes.append(given["input_ids"].shape), with_kwargs=True
    )
    likelihoods(model, [Asked((1, 2, 3), (token,)) for token in range(10)])
    hook.remove()
    assert passes == [(1, 3)]


@pytest.mark.parametrize("length", [1, 3, 7, 16, 100])
@pytest.mark.parametrize("count", [1, 2, 7, 15, 16, 17, 40])
def test_windows_are_lm_evals(length: int, count: int) -> None:
    utils = pytest.importorskip("lm_eval.utils")
    ids = list(range(100, 100 + count))
    theirs = utils.get_rolling_token_windows(ids, prefix_token=7, max_seq_len=length, context_len=1)
    wanted = [([*read, predicted[-1]], len(predicted)) for read, predicted in theirs]
    assert [tuple(window) for window in windows(ids, 7, length)] == wanted
    assert sum(window.new for window in windows(ids, 7, length)) == count


@pytest.mark.parametrize("length", [5, 12, 64])
def test_losses_are_those_of_single_tokens_in_their_windows(model: Any, length: int) -> None:
    bind_head(model)
    texts = [list(range(10, 10 + count)) for count in (1, 4, 12, 30)]
    found = losses(model, texts, 3, length)
    for loss, ids in zip(found, texts, strict=True):
        nats = 0.0
        for window in windows(ids, 3, length):
            for place in range(len(window.ids) - window.new, len(window.ids)):
                nats -= one_by_one(model, Asked(tuple(window.ids[:place]), (window.ids[place],)))[0]
        assert loss == (pytest.approx(nats, rel=1e-5), len(ids))


def test_perplexity_and_bits_are_sums_over_sums() -> None:
    found = metrics_of([Loss(10.0, 4), Loss(2.0, 6)], ["abcé", "xy"])
    assert found["perplexity"].estimate().value == pytest.approx(math.exp(12 / 10))
    assert found["bits_per_byte"].estimate().value == pytest.approx(12 / math.log(2) / 7)


def test_a_text_begins_behind_bos_or_else_eos() -> None:
    class Tokenizer:
        bos_token_id: int | None = 1
        eos_token_id: int | None = 2

    tokenizer = Tokenizer()
    assert prefix_of(tokenizer) == 1
    tokenizer.bos_token_id = None
    assert prefix_of(tokenizer) == 2
    tokenizer.eos_token_id = None
    with pytest.raises(InputError, match="neither a bos nor an eos"):
        prefix_of(tokenizer)
