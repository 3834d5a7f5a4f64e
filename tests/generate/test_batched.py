"""Answers to several prompts at once are those that each prompt gets alone."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

import halfbyte
from halfbyte.generate import stream_reply
from halfbyte.generate.batched import answer_all

TEXTS = ["a", "Who is it?", "x" * 40, "and then they went home by night", "7 "]


@pytest.mark.parametrize(
    ("together", "tokens", "batches"),
    [(1, None, [1] * 5), (2, None, [2, 2, 1]), (5, None, [5]), (5, 40, [2, 1, 1, 1]), (5, 66, [3, 1, 1])],
)
def test_answers_are_those_of_each_prompt_alone(
    tiny_model_folder: Path, together: int, tokens: int | None, batches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    prompts = [tokenizer(text)["input_ids"] for text in TEXTS]
    seen: list[int] = []
    generate = model.generate

    def counted(**arguments: torch.Tensor) -> object:
        seen.append(len(arguments["input_ids"]))
        return generate(**arguments)

    with monkeypatch.context() as patch:
        patch.setattr(model, "generate", counted)
        answers = answer_all(model, tokenizer, prompts, max_new_tokens=12, batch_size=together, most_tokens=tokens)
    assert seen == batches  # prompts of 1, 2, 10, 32 and 40 tokens
    for text, answer in zip(TEXTS, answers, strict=True):
        assert answer.text == "".join(stream_reply(model, tokenizer, text, max_new_tokens=12))
        assert len(answer.ids) <= 12 and answer.is_number


def test_an_answer_ends_where_the_model_can_attend_no_further(tiny_model_folder: Path) -> None:
    model = halfbyte.load(tiny_model_folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    [answer] = answer_all(model, tokenizer, [[40 + i % 9 for i in range(250)]], max_new_tokens=100)
    assert 1 <= len(answer.ids) <= 6  # of 256 positions


def test_what_is_written_of_a_source_is_what_it_gets_alone(task_folder: Callable[[str], Path]) -> None:
    folder = task_folder("t5")
    model = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    answers = answer_all(model, tokenizer, [tokenizer(text)["input_ids"] for text in TEXTS], max_new_tokens=9)
    for text, answer in zip(TEXTS, answers, strict=True):
        assert answer.text == "".join(stream_reply(model, tokenizer, text, max_new_tokens=9))


def test_logits_that_are_not_numbers_are_seen_in_the_row_that_has_them(tiny_model_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    with torch.no_grad():
        model.config.tie_word_embeddings = False
        model.model.embed_tokens.weight = torch.nn.Parameter(model.model.embed_tokens.weight.clone())
        model.model.embed_tokens.weight[tokenizer("z")["input_ids"][0]] = torch.nan
    answers = answer_all(model, tokenizer, [tokenizer(text)["input_ids"] for text in ("ab", "az")], max_new_tokens=1)
    assert [answer.is_number for answer in answers] == [True, False]
