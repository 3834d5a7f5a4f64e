"""Text as it comes against the decoded answer in one piece, for tokenizers of several kinds."""

import random
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from halfbyte.generate.text import LONGEST_WINDOW, TextStream

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
WORDS = ["▁", "▁▁", "▁a", "b", "▁the", "\n", "▁cat", "s", "!", "é", "\ufffd", "▁x", "."]


def byte_level() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def metaspace() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(["<unk>", *WORDS])}, [], unk_token="<unk>"))
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    return tokenizer


def llama_2() -> Tokenizer:
    vocab = {word: i for i, word in enumerate(["<unk>", *BYTES, *WORDS])}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def word_piece() -> Tokenizer:
    words = ["[UNK]", "a", "##b", "the", "##s", "cat", "##é", "do", "it"]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return tokenizer


KINDS = {"byte level": byte_level, "metaspace": metaspace, "llama 2": llama_2, "word piece": word_piece}


def fast(kind: str) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=KINDS[kind](), eos_token="</s>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|a|>"]})
    return tokenizer


def decoded(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def answer(tokenizer: PreTrainedTokenizerFast, draw: random.Random) -> list[int]:
    """Return token ids: any, and bytes that make whole characters.

    Bytes that a SentencePiece vocabulary falls back to stand between words: a longer run of them, if any part of it is
    no character, decodes to no character at all.
    """
    count = draw.choice([0, 1, 5, 150])
    falls_back = "<0x00>" in tokenizer.get_vocab()
    ids: list[int] = []
    for _ in range(count):
        ids.append(draw.randrange(1 + 256 * falls_back, len(tokenizer)))
        if draw.random() < 0.2:
            text = draw.choice(["🦙", "né", "日本"])
            names = [f"<0x{byte:02X}>" for byte in text.encode()][: draw.choice([1, 9, 9])]
            whole = tokenizer(text, add_special_tokens=False)["input_ids"]
            ids += (
                [*tokenizer.convert_tokens_to_ids(names), *tokenizer.convert_tokens_to_ids(["b"])]
                if falls_back
                else whole
            )
    return ids


@pytest.mark.parametrize("kind", KINDS)
def test_the_pieces_make_up_the_decoded_answer(kind: str) -> None:
    tokenizer, draw = fast(kind), random.Random(0)
    for _ in range(40):
        ids = answer(tokenizer, draw)
        stream = TextStream(tokenizer)
        pieces = [*map(stream.add, ids), stream.end()]
        assert "".join(pieces) == decoded(tokenizer, ids)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stops", [("a",), ("s!", "cat"), (" the cat", "bb\n"), ("é", "abc", "ab\n")], ids=str)
def test_the_answer_ends_before_the_first_stop_string_wherever_tokens_part_it(kind: str, stops: tuple[str]) -> None:
    tokenizer, draw = fast(kind), random.Random(1)
    was_stopped = 0
    for _ in range(40):
        ids, given = answer(tokenizer, draw), ""
        stream, whole = TextStream(tokenizer, stops), decoded(tokenizer, ids)
        for token in ids:
            given += stream.add(token)
            assert not any(stop in given for stop in stops)
            if stream.is_stopped:
                break
        given += stream.end()
        places = [place for stop in stops if (place := whole.find(stop)) >= 0]
        was_stopped += stream.is_stopped
        assert stream.is_stopped == bool(places)
        assert given == (whole[: min(places)] if places else whole)
    assert was_stopped or kind == "word piece" or stops[0] != "a"


@pytest.mark.parametrize("offset", range(3))
def test_a_long_run_of_single_bytes_comes_character_by_character(offset: int) -> None:
    tokenizer, text = fast("llama 2"), "日本" * 60
    lengths = counted(tokenizer)
    names = ["b"] * offset + [f"<0x{byte:02X}>" for byte in text.encode()]
    stream = TextStream(tokenizer)
    pieces = [stream.add(tokenizer.convert_tokens_to_ids(name)) for name in names]
    assert "".join(pieces) == "b" * offset + text
    assert max(map(len, pieces)) == 1
    assert max(lengths) <= LONGEST_WINDOW + 4


def test_only_what_could_begin_a_stop_string_is_held_back() -> None:
    tokenizer = fast("byte level")
    stream = TextStream(tokenizer, ("END", "DOT."))
    assert [stream.add(token) for token in tokenizer("xENxDOE")["input_ids"]] == ["x", "", "", "ENx", "", "", "DO"]
    assert stream.end() == "E"


def counted(tokenizer: Any) -> list[int]:
    """Return the list of how many tokens are decoded each time from now on."""
    decode, lengths = tokenizer.decode, []

    def counting(ids: list[int], **options: Any) -> Any:
        lengths.append(len(ids))
        return decode(ids, **options)

    tokenizer.decode = counting
    return lengths


def test_each_token_decodes_a_window_and_not_the_whole_answer() -> None:
    tokenizer = fast("llama 2")
    lengths, stream = counted(tokenizer), TextStream(tokenizer)
    letter = tokenizer.convert_tokens_to_ids("▁cat")
    given = "".join([stream.add(letter) for _ in range(1000)])
    assert given == ("cat " * 1000).rstrip()
    assert max(lengths) <= LONGEST_WINDOW + 1
