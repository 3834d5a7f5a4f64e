"""Which token begins where: of fast tokenizers by what they say or by their tokens' lengths, of slow ones by trying."""

import copy
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, GPTSw3Tokenizer, PreTrainedTokenizerFast

from halfbyte.choices import IGNORED
from halfbyte.data import Chat, Completion, Example, Text, encode_examples
from halfbyte.data.encoders import FastEncoder, Source, encoder_for
from halfbyte.errors import InputError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif %}"
)
CORPUS = ["It is good, it is. 日本 été 😀", "a b  c\n\nd <|im_end|> user assistant", "a\n\n"] * 3
TEXT = st.text("ab é\u0301日😀\n\t.|<", max_size=20)


def byte_level(normalizer: Any = None, prefix: bool = False) -> Any:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>")
    fast.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    fast.chat_template = CHATML
    return fast


def places(tokens: Any, text: str) -> list[tuple[int | None, int]]:
    return [(tokens.border(at), tokens.until(at)) for at in range(1, len(text))]


@pytest.mark.parametrize("normalizer", [None, normalizers.NFC(), normalizers.Lowercase()])
@pytest.mark.parametrize("prefix", [False, True])
@given(text=TEXT)
@settings(max_examples=150)
def test_lengths_of_tokens_give_the_places_that_the_tokenizer_gives(normalizer: Any, prefix: bool, text: str) -> None:
    tokenizer = byte_level(normalizer, prefix)
    text = text + "<|im_end|>" + text
    [said] = FastEncoder(tokenizer, {})([Source(text)])
    found = FastEncoder(tokenizer, {})([Source(text)] * 64)[5]  # of so many it looks at the lengths
    assert found.ids.tolist() == said.ids.tolist() == tokenizer(text)["input_ids"]
    assert places(found, text) == places(said, text)


def test_lengths_are_looked_at_only_where_they_can_be_trusted() -> None:
    kinds = []
    for tokenizer in (byte_level(), byte_level(normalizers.NFC()), byte_level(prefix=True)):
        texts = [Source("It is"), Source("e\u0301")] * 40
        kinds.append([type(tokens).__name__ for tokens in FastEncoder(tokenizer, {})(texts)[:2]])
    assert kinds == [["ByteTokens"] * 2, ["ByteTokens", "FastTokens"], ["FastTokens"] * 2]


def test_a_tokenizer_is_left_as_it_was() -> None:
    tokenizer = byte_level()
    tokenizer("a", truncation=True, max_length=1, padding="max_length")
    backend = tokenizer.backend_tokenizer
    before = backend.to_str()
    assert json.loads(before)["truncation"] and json.loads(before)["padding"]
    for count in (1, 100):
        tokens = FastEncoder(tokenizer, {})([Source("a b c d e f")] * count)
        assert len(tokens[0].ids) > 1
        assert backend.to_str() == before


def test_threads_that_share_a_tokenizer_leave_it_as_it_was() -> None:
    tokenizer = byte_level()
    backend = tokenizer.backend_tokenizer
    before, texts = backend.to_str(), [Source("It is good. " * 50)] * 70
    expected = FastEncoder(tokenizer, {})(texts)[0].ids.tolist()
    with ThreadPoolExecutor(8) as threads:
        made = list(threads.map(lambda _: FastEncoder(tokenizer, {})(texts)[0].ids.tolist(), range(64)))
    assert made == [expected] * 64
    assert backend.to_str() == before


LLAMA3 = (  # its pre-tokenizer keeps blank lines together, GPT-2's does not
    r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.mark.parametrize("blank_lines_stay", [True, False])
def test_prompts_that_end_in_a_blank_line_are_cut_off_only_where_that_matters(
    blank_lines_stay: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = CHATML.replace("assistant{{ '\n' }}", "assistant\n\n").replace("}}\n{{", "}}\n\n{{")
    if blank_lines_stay:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    texts = [f"It is {n} good {'and good ' * 50}" for n in range(200)]
    turns = [[{"role": "user", "content": text}, {"role": "assistant", "content": f"it {text}"}] for text in texts]
    given_: list[int] = []
    encode = FastEncoder.__call__
    monkeypatch.setattr(
        FastEncoder,
        "__call__",
        lambda self, sources: given_.append(sum(map(len, map(str, sources)))) or encode(self, sources),
    )
    rows = rows_of([Chat("", chat) for chat in turns], tokenizer)
    once = given_[0]
    assert once > 200 * 2 * 450
    assert (sum(given_) < 1.1 * once) == blank_lines_stay
    for chat, row in zip(turns, rows, strict=True):
        prompt = tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True, return_dict=False)
        assert tokenizer.decode(prompt).endswith("assistant\n\n")
        assert row["input_ids"][: len(prompt)] == prompt
        assert row["labels"][len(prompt) - 1] == IGNORED != row["labels"][len(prompt)]


class Slow(PreTrainedTokenizerFast):  # type: ignore[misc]
    """A fast tokenizer that does not say so: the slow way must come to the same."""

    @property
    def is_fast(self) -> bool:
        return False


def slow_and_fast() -> tuple[Any, Any]:
    fast = byte_level()
    slow = Slow(tokenizer_object=fast.backend_tokenizer, eos_token="</s>", pad_token="</s>")
    slow.chat_template = CHATML
    return slow, fast


def rows_of(examples: list[Example], tokenizer: Any) -> list[dict[str, list[int]]]:
    encoded = list(encode_examples(examples, tokenizer, 10_000))
    assert not any(one.bad for one in encoded)
    return [{name: values.tolist() for name, values in row.items()} for one in encoded for row in one.rows]


@given(contents=st.lists(st.text("ab é日\n\t.", min_size=1, max_size=8), min_size=4, max_size=4))
@settings(max_examples=150)
def test_slow_tokenizers_give_the_rows_of_fast_ones(contents: list[str]) -> None:
    slow, fast = slow_and_fast()
    turns = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    examples = [Chat("", turns), Text("", contents[0])]
    assert rows_of(examples, slow) == rows_of(examples, fast)
    slow.chat_template = fast.chat_template = None
    examples = [Completion("", contents[0], contents[1])]
    assert rows_of(examples, slow) == rows_of(examples, fast)


def test_byt5_trains_the_bytes_of_answers_and_the_end() -> None:
    tokenizer = ByT5Tokenizer()
    byte = tokenizer.convert_tokens_to_ids("a") - ord("a")
    [row] = rows_of([Completion("", "é? ", "日 </s>b")], tokenizer)
    answer = "日 </s>b".encode()
    assert row["input_ids"] == [*(i + byte for i in "é? ".encode()), *(i + byte for i in answer), 1]
    assert row["labels"] == [IGNORED] * len("é? ".encode()) + row["input_ids"][len("é? ".encode()) :]


def sentence_piece(folder: Path, **settings: Any) -> Any:
    (folder / "corpus.txt").write_text("\n".join(CORPUS * 5), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"), model_prefix=str(folder / "sp"), vocab_size=300, model_type="bpe",
        byte_fallback=True, character_coverage=0.98, minloglevel=2, pad_id=3, **settings
    )  # fmt: skip
    tokenizer = GPTSw3Tokenizer(
        str(folder / "sp.model"), pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        name_or_path="gpt-sw3-1b",
    )  # fmt: skip
    tokenizer.add_tokens(
        [AddedToken(token, special=True, normalized=False) for token in ("<|im_start|>", "<|im_end|>")], True
    )
    tokenizer.chat_template = CHATML.replace("\n", "")  # of which it would make a space
    return tokenizer


CONTENTS = ["Is it good?", "it is", "a <|im_end|> b", "日本 <|im_end|> c"]
TURNS = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(CONTENTS)]


def test_a_sentencepiece_tokenizer_trains_answers_behind_the_prompt_of_use(tmp_path: Path) -> None:
    tokenizer = sentence_piece(tmp_path)
    assert not tokenizer.is_fast
    [row] = rows_of([Chat("", TURNS)], tokenizer)
    ids, trained = row["input_ids"], [label != IGNORED for label in row["labels"]]
    edges = [i for i in range(1, len(ids)) if trained[i] != trained[i - 1]] + [len(ids)]
    pieces = [tokenizer.convert_ids_to_tokens(ids[edges[i] : edges[i + 1]]) for i in (0, 2)]
    answers = ["".join(piece).replace("▁", " ") for piece in pieces]  # its decode() puts a space before a text
    assert answers == [f"{content}<|im_end|>" for content in CONTENTS[1::2]]
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert ids.count(stop) == 4 and row["labels"].count(stop) == 2
    prompt = tokenizer.apply_chat_template(TURNS[:1], add_generation_prompt=True, return_dict=False)
    assert ids[: edges[0]] == prompt


def test_a_control_token_that_cannot_be_plain_text_is_a_bad_row(tmp_path: Path) -> None:
    tokenizer = sentence_piece(tmp_path, user_defined_symbols=["<|im_start|>", "<|im_end|>"])
    fine, bad = encode_examples([Chat("row 1", TURNS[:2]), Chat("row 2", TURNS)], tokenizer, 1000)
    assert fine.rows and not fine.bad
    assert not bad.rows and bad.bad and bad.bad.kind == "control token that cannot be plain text"
    [parsed] = encode_examples([Chat("row 2", TURNS)], tokenizer, 1000, parse_special_tokens=True)
    assert parsed.rows and not parsed.bad


def test_a_tokenizer_that_takes_no_texts_is_refused() -> None:
    MistralCommonBackend = type("MistralCommonBackend", (), {})
    with pytest.raises(InputError, match="tokenizer of mistral-common"):
        encoder_for(MistralCommonBackend(), {})


def test_a_tokenizer_that_cannot_be_copied_says_what_to_do() -> None:
    tokenizer = copy.deepcopy(byte_level())

    class Own:
        def pre_tokenize(self, pretok: Any) -> None:
            pass

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.PreTokenizer.custom(Own())
    with pytest.raises(InputError, match=r"cannot keep control tokens .* parse_special_tokens"):
        rows_of([Text("", "a</s>b")], tokenizer)
