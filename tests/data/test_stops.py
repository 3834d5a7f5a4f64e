"""Where answers end, and what of a tokenizer stands in the way."""

from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from halfbyte.data import Chat, encode_examples
from halfbyte.data.stops import check_tokenizer, choose_pad, stop_ids, trained_stop

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif %}"
)
WITH_BOS = "{{ bos_token }}" + CHATML


def tokenizer_with(*special: str, template: str | None = CHATML, **named: Any) -> Any:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)
    tokens = ["<|im_start|>", "<|im_end|>", *special]
    fast.add_tokens([AddedToken(token, special=True, normalized=False) for token in tokens], True)
    fast.chat_template = template
    return fast


def ids(tokenizer: Any, *tokens: str) -> list[int]:
    return sorted(tokenizer.convert_tokens_to_ids(list(tokens)))


def test_generation_stops_at_what_is_trained_and_at_what_the_model_names() -> None:
    tokenizer = tokenizer_with("<|other|>", eos_token="<|end|>")
    assert trained_stop(tokenizer) == tokenizer.convert_tokens_to_ids("<|im_end|>")
    other = tokenizer.convert_tokens_to_ids("<|other|>")
    assert stop_ids(tokenizer) == ids(tokenizer, "<|im_end|>", "<|end|>")
    assert stop_ids(tokenizer, other) == stop_ids(tokenizer, [other]) == ids(
        tokenizer, "<|im_end|>", "<|end|>", "<|other|>"
    )  # fmt: skip
    refusing = tokenizer_with(template="{{ raise_exception('no') }}", eos_token="<|end|>")
    assert trained_stop(refusing) is None
    assert stop_ids(refusing) == ids(refusing, "<|end|>")


def test_an_end_token_that_the_template_never_writes_is_told() -> None:
    tokenizer = tokenizer_with("<|other|>", eos_token="<|end|>")
    [said] = check_tokenizer(tokenizer, tokenizer.convert_tokens_to_ids("<|other|>"))
    assert "end with '<|im_end|>'" in said and "stops at '<|end|>', '<|other|>'" in said
    assert check_tokenizer(tokenizer, ids(tokenizer, "<|im_end|>", "<|other|>")) == []
    assert check_tokenizer(tokenizer_with(eos_token="<|im_end|>")) == []


@pytest.mark.parametrize(("template", "told"), [(CHATML, True), (WITH_BOS, False), (None, False)])
def test_rows_begin_once_and_a_template_that_does_not_begin_them_is_told(template: str | None, told: bool) -> None:
    tokenizer = tokenizer_with(template=template, bos_token="<s>", eos_token="<|im_end|>")
    tokenizer.add_bos_token = True
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    said = check_tokenizer(tokenizer)
    assert len(said) == told and all("does not begin with '<s>'" in sentence for sentence in said)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    [encoded] = encode_examples([Chat("", turns)], tokenizer, 100)
    assert encoded.rows[0]["input_ids"].tolist().count(tokenizer.bos_token_id) == (not told)


@pytest.mark.parametrize(
    ("special", "named", "chosen"),
    [
        (["<pad>", "<reserved_1>"], {}, "<pad>"),
        (["<|finetune_right_pad_id|>", "<reserved_1>"], {}, "<|finetune_right_pad_id|>"),
        (["<|vision_pad|>", "<reserved_1>", "<reserved_2>"], {}, "<reserved_2>"),
        ([], {"unk_token": "<unk>"}, "<unk>"),
        ([], {}, "<|end|>"),
    ],
)
def test_a_missing_pad_token_is_chosen_and_told(special: list[str], named: dict[str, str], chosen: str) -> None:
    tokenizer = tokenizer_with(*special, eos_token="<|end|>", **named)
    size = len(tokenizer)
    said = choose_pad(tokenizer)
    assert said == f"The tokenizer names no pad token; {chosen!r} is taken"
    assert (tokenizer.pad_token, len(tokenizer)) == (chosen, size)
    assert choose_pad(tokenizer) is None


def test_the_pad_token_has_a_row_in_the_embedding() -> None:
    tokenizer = tokenizer_with("<pad>", eos_token="<|end|>")
    choose_pad(tokenizer, rows=tokenizer.convert_tokens_to_ids("<pad>"))
    assert tokenizer.pad_token == "<|end|>"


def test_a_pad_token_that_ends_answers_is_trained_all_the_same() -> None:
    rows = []
    for pad in ("<|im_end|>", "<|end|>"):
        tokenizer = tokenizer_with(eos_token="<|end|>")
        tokenizer.pad_token = pad
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        [encoded] = encode_examples([Chat("", turns)], tokenizer, 100)
        rows.append({name: values.tolist() for name, values in encoded.rows[0].items()})
    assert rows[0] == rows[1] and rows[0]["labels"][-1] == ids(tokenizer, "<|im_end|>")[0]
