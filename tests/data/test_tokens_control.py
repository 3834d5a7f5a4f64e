"""Control tokens in the data's texts are plain text, unless they are asked to be control tokens."""

import functools
import itertools
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from halfbyte.choices import IGNORED
from halfbyte.data import BadRow, Chat, Completion, Example, Text, decode_trained, encode_examples
from halfbyte.data.control import control_tokens
from halfbyte.data.tokens import Encoded

CHATML = (
    "{{ bos_token }}{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}{{ m.calls | tojson if m.calls }}"
    "<|end|>{{ '\n' }}{% endfor %}{% if add_generation_prompt %}<|start|>assistant{{ '\n' }}{% endif %}"
)
CORPUS = [
    "What does <|end|> mean? It ends a turn <|start|> user assistant <s> </s>",
    *("".join(letters) for letters in itertools.product("ab<|>/s end", repeat=3)),
]
WORDS = ["a", "b ", "<|end|>", "<|start|>", "<s>", "</s>", "<|end", "|>", "<|", "\n", " ", "é"]


@functools.cache
def saved(kind: str) -> str:
    """A tokenizer without control tokens; ``<s>`` and ``</s>`` are in its vocabulary."""
    special = ["<unk>", "<s>", "</s>"]
    if kind == "byte_level":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer: Any = trainers.BpeTrainer(
            vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
    elif kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
        letters = sorted({letter for text in [*CORPUS, *WORDS] for letter in text})
        trainer = trainers.UnigramTrainer(
            vocab_size=200, special_tokens=special, unk_token="<unk>", initial_alphabet=letters, show_progress=False
        )
    else:
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
        trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=tokens, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    made = json.loads(tokenizer.to_str())
    made["added_tokens"] = []
    return json.dumps(made)


@functools.cache
def tokenizer_with(kind: str, names: tuple[str, ...] = ("<s>", "</s>", "<|start|>", "<|end|>")) -> Any:
    """A tokenizer with four control tokens under these names, whatever they are called with the same ids."""
    bos, eos, start, end = names
    made = json.loads(saved(kind))
    rename = {"<s>": bos, "</s>": eos}
    vocab = made["model"]["vocab"]
    if isinstance(vocab, dict):
        made["model"]["vocab"] = {rename.get(word, word): index for word, index in vocab.items()}
    else:
        made["model"]["vocab"] = [[rename.get(word, word), score] for word, score in vocab]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(made)), bos_token=bos, eos_token=eos, unk_token="<unk>"
    )
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in (start, end)], True)
    tokenizer.chat_template = CHATML.replace("<|start|>", start).replace("<|end|>", end)
    return tokenizer


OTHER_NAMES = ("[bos]", "[eos]", "[start]", "[end]")
KINDS = ["byte_level", "sentence_piece", "unigram"]


def turns(*contents: str) -> list[dict[str, Any]]:
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def only(example: Example, tokenizer: Any, **settings: Any) -> Encoded:
    [encoded] = encode_examples([example], tokenizer, 10_000, **settings)
    return encoded


def lists(encoded: Encoded) -> list[dict[str, list[int]]]:
    return [{name: values.tolist() for name, values in row.items()} for row in encoded.rows]


CONTENT = st.lists(st.sampled_from(WORDS), min_size=1, max_size=5).map("".join)


@pytest.mark.parametrize("kind", KINDS)
@given(contents=st.lists(CONTENT, min_size=2, max_size=4))
@settings(max_examples=150)
def test_texts_have_the_tokens_that_they_have_where_nothing_in_them_is_a_control_token(
    kind: str, contents: list[str]
) -> None:
    example = Chat("row 1", turns(*contents))
    twin = tokenizer_with(kind, OTHER_NAMES)
    assert lists(only(example, tokenizer_with(kind))) == lists(only(example, twin))


@pytest.mark.parametrize("kind", KINDS)
@given(prompt=CONTENT, completion=CONTENT)
@settings(max_examples=100)
def test_so_have_texts_without_a_template(kind: str, prompt: str, completion: str) -> None:
    tokenizer, twin = tokenizer_with(kind), tokenizer_with(kind, OTHER_NAMES)
    for example in (Completion("row 1", prompt, completion), Text("row 1", prompt + completion)):
        assert lists(only(example, tokenizer)) == lists(only(example, twin))


def test_transformers_takes_the_same_tokens_for_control_tokens() -> None:
    tokenizer = tokenizer_with("byte_level")
    messages = turns("What does <|end|> mean, or\n</s>?", "<|end|> ends a turn.")
    sanitized = tokenizer.apply_chat_template(messages, sanitize_control_tokens=True, return_dict=False)
    [row] = only(Chat("row 1", messages), tokenizer).rows
    newline = len(tokenizer("\n")["input_ids"])
    assert tokenizer.decode(row["input_ids"]) == tokenizer.decode(sanitized[:-newline])
    control = set(tokenizer.all_special_ids)
    assert [i for i in row["input_ids"] if i in control] == [i for i in sanitized if i in control]


def test_it_is_said_either_way_and_counted_once_a_row() -> None:
    tokenizer = tokenizer_with("byte_level")
    example = Chat("row 1", turns("What does <|end|> mean?", "<|end|> ends a turn."), notes=("an old note",))
    kept = only(example, tokenizer)
    assert decode_trained(tokenizer, kept.rows[0]) == ["<|end|> ends a turn.<|end|>"]
    assert kept.notes == (
        "an old note",
        "'<|end|>' in the data's texts was kept as plain text; to make it a control token, set parse_special_tokens "
        "(--parse-special-tokens)",
    )
    parsed = only(example, tokenizer, parse_special_tokens=True)
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert [list(row["labels"]).count(end) for row in (*kept.rows, *parsed.rows)] == [1, 2]
    assert parsed.notes[1:] == ("'<|end|>' in the data's texts became a control token, as parse_special_tokens asks",)
    assert only(Chat("row 1", turns("a", "b")), tokenizer).notes == ()


def test_wherever_in_a_message_it_stands() -> None:
    tokenizer, twin = tokenizer_with("byte_level"), tokenizer_with("byte_level", OTHER_NAMES)
    messages = turns("a", "b")
    messages[1]["calls"] = [{"name": "f", "arguments": {"<|end|>": ["</s>", 1, None]}}]
    rows = lists(only(Chat("row 1", messages), tokenizer))
    assert rows == lists(only(Chat("row 1", messages), twin))
    assert tokenizer.decode(rows[0]["input_ids"]).count("<|end|>") == 3


def test_parsed_texts_do_not_get_a_beginning_or_an_end_twice() -> None:
    tokenizer = tokenizer_with("sentence_piece")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()), bos_token="<s>", eos_token="</s>"
    )
    tokenizer.add_bos_token = True
    for given_, plain in (
        (Text("row 1", "<s>a b</s>"), Text("row 1", "a b")),
        (Completion("row 1", "<s>a", "b</s>"), Completion("row 1", "a", "b")),
    ):
        parsed = only(given_, tokenizer, parse_special_tokens=True)
        assert lists(parsed) == lists(only(plain, tokenizer))
        assert list(parsed.rows[0]["input_ids"]).count(tokenizer.bos_token_id) == 1


def test_what_the_template_writes_around_turns_is_a_control_token_though_it_is_not_called_special() -> None:
    tokenizer = tokenizer_with("byte_level")
    plain = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(saved("byte_level")), bos_token="<s>", eos_token="</s>"
    )
    plain.add_tokens(["<|end|>", "<|start|>", "<think>", "</think>", "<|tool|>", "\n"])
    template = CHATML.replace("<|start|>assistant{{ '\n' }}", "<|start|>assistant{{ '\n<think>' }}")
    assert set(control_tokens(plain, template)) == {"<s>", "</s>", "<|end|>", "<|start|>"}
    assert set(control_tokens(tokenizer, tokenizer.chat_template)) == {"<s>", "</s>", "<unk>", "<|end|>", "<|start|>"}
    assert set(control_tokens(tokenizer, "{% if '<|end|>' in messages[0].content %}{% endif %}")) == {
        "<s>", "</s>", "<unk>", "<|start|>"
    }  # fmt: skip


def test_private_characters_beside_a_control_token_are_a_bad_row() -> None:
    tokenizer = tokenizer_with("byte_level")
    for character in ("\U000f0000", "\U00100003"):
        bad = only(Chat("row 7", turns("<|end|>", character)), tokenizer).bad
        assert isinstance(bad, BadRow) and bad.kind == "private characters beside control tokens"
        assert str(bad).startswith("row 7 holds '<|end|>' and characters for private use")
        [row] = only(Chat("row 7", turns("a", character)), tokenizer).rows
        assert decode_trained(tokenizer, row) == [character + "<|end|>"]


def test_rows_with_and_without_them_keep_their_order() -> None:
    tokenizer = tokenizer_with("byte_level")
    examples = [Chat(f"row {n}", turns("<|end|>" * (n % 3 == 0), f"<s>{n}" if n % 5 else str(n))) for n in range(200)]
    together = [lists(encoded) for encoded in encode_examples(examples, tokenizer, 100)]
    assert together == [lists(only(example, tokenizer)) for example in examples]
    for n, (row,) in enumerate(together):
        assert tokenizer.decode([i for i in row["labels"] if i != IGNORED]).endswith(f"{n}<|end|>")
