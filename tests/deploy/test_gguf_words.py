"""llama.cpp makes of a text the ids that transformers' tokenizer makes of it."""

import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from halfbyte.deploy.export.gguf import export_gguf
from halfbyte.errors import InputError
from halfbyte.hf.models.gguf_form.splits import PROBE, WAYS, Way, way_of
from llama import Llama, opened

TEXTS = (
    "", " ", "  ", "a", " a", "a ", "\n", "\n\n\n", "\t\tx", " \n \n", "Hello world", "  leading and   inner   spaces  ",
    "it's we'll they'VE I'M don't 'tis", "1 12 123 1234 12345 3.14159 1,000,000", "camelCase HTTPServer snake_case x1y2",
    "naïve café Ünïcödé", "e\u0301 a\u0308 o\u0302", "你好，世界。中文abc混合123", "テスト カタカナ ひらがな", "한국어 텍스트",
    "русский текст", "العربية نص", "हिन्दी पाठ १२३", "ภาษาไทย", "🙂🙃 👩‍👩‍👧‍👦 🇩🇪", "₿ $5 €6 ½ ² ⅷ", "\u00a0nbsp\u2003em\u200bzero",
    "def f(x):\n    return x**2  # comment\n\n\nprint(f(3))", "<b>bold</b> &amp; a/b\\c //// /* */ === --- ...",
    "line one\r\nline two\r\n\r\nline four", "tabs\t\tand \t mixed", "“quoted” «guillemets» — dash… ‽",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐍈 𓀀", "\u0000\u0001\u001f control", "a" * 70, "ab " * 40, "<|im_start|>user\nhi<|im_end|>\n", "<tool>x</tool> y",
    PROBE,
)  # fmt: skip
CORPUS = [
    *TEXTS * 4,
    Path(__file__).read_text(encoding="utf-8"),
    (Path(__file__).parents[1] / "conftest.py").read_text(),
]
SPECIAL = ["<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>"]


def save(tokenizer: PreTrainedTokenizerBase, folder: Path, rows: int | None = None) -> Path:
    """The smallest model that has a row for each token."""
    tokenizer.save_pretrained(folder)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=rows or len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        )
    ).save_pretrained(folder)  # fmt: skip
    return folder


def bytes_cut(way: Way, **options: Any) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that cuts texts so, trained."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=way.whole))
    rules = [pre_tokenizers.Split(Regex(rule), "isolated") for rule in way.rules]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*rules, pre_tokenizers.ByteLevel(False, use_regex=False)])
    return trained(tokenizer, **options)


def trained(tokenizer: Tokenizer, **options: Any) -> PreTrainedTokenizerFast:
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False), AddedToken("</tool>", normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **{"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | options
    )


def differing(llama: Llama, tokenizer: PreTrainedTokenizerBase, special: bool = False) -> dict[str, Any]:
    """Texts of which the two make other ids."""
    return {
        text: (found, wanted)
        for text in TEXTS
        if (found := llama.ids(text, special=special))
        != (wanted := tokenizer(text, add_special_tokens=special).input_ids)
    }


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
def test_a_way_of_cutting_is_recognised_and_no_two_are_taken_for_each_other(way: Way) -> None:
    tokenizer = bytes_cut(way).backend_tokenizer
    assert way_of(tokenizer, way.whole) == way.name
    alike = {other.name for other in WAYS if other.rules == way.rules}
    assert (way_of(tokenizer, not way.whole) or way.name) in alike


def test_the_form_of_the_rules_does_not_matter() -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert way_of(tokenizer, False) == "gpt-2"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    assert way_of(tokenizer, False) == "smollm"


UNLIKE = {
    # llama.cpp tells capitals by A to Z alone, so it cuts at others nowhere (its own note at the rule).
    "tekken": {"naïve café Ünïcödé", "русский текст", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐍈 𓀀", PROBE},
    "gpt-4o": {"naïve café Ünïcödé", "русский текст", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐍈 𓀀", PROBE},
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
def test_llama_cpp_makes_the_same_ids_of_bytes(way: Way, tmp_path: Path) -> None:
    tokenizer = bytes_cut(way)
    copy = export_gguf(save(tokenizer, tmp_path / "model"), tmp_path / "out", to="f32")
    with opened(copy.file) as llama:
        unlike = differing(llama, tokenizer)
        assert set(unlike) <= UNLIKE.get(way.name, set()), unlike


@pytest.mark.slow
def test_llama_cpp_puts_the_same_tokens_around_a_text(tmp_path: Path) -> None:
    for name, single in (("both", "<s> $A </s>"), ("begin", "<s> $A"), ("none", "$A")):
        tokenizer = bytes_cut(WAYS[2])
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[("<s>", 0), ("</s>", 1)]
        )
        copy = export_gguf(save(tokenizer, tmp_path / name), tmp_path / f"{name} out", to="f32")
        with opened(copy.file) as llama:
            assert not differing(llama, tokenizer, special=True)


def sentence_pieces(folder: Path, kind: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "corpus.txt").write_text("\n".join(CORPUS), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"), model_prefix=str(folder / "tokenizer"), vocab_size=700, model_type=kind,
        byte_fallback=kind == "bpe", character_coverage=0.98, normalization_rule_name="identity", split_digits=True,
        remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, minloglevel=2, unk_id=0, bos_id=1, eos_id=2,
    )  # fmt: skip
    return folder / "tokenizer.model"


def of_pieces(file: Path, first: str | None) -> PreTrainedTokenizerFast:
    """A SentencePiece BPE as the tokenizers package has it: its merges are the pairs that make a piece, best first."""
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(file))
    vocabulary = {pieces.id_to_piece(i): i for i in range(pieces.vocab_size())}
    scores = {pieces.id_to_piece(i): pieces.get_score(i) for i in range(pieces.vocab_size()) if not pieces.is_byte(i)}
    merges = [
        (scores[piece], piece[:i], piece[i:])
        for piece in scores
        for i in range(1, len(piece))
        if piece[:i] in scores and piece[i:] in scores
    ]
    merges.sort(key=lambda merge: -merge[0])
    model = models.BPE(vocabulary, [(a, b) for _, a, b in merges], byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    space = [normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), *space] if first == "always" else space)
    if first == "first":
        tokenizer.normalizer = None
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    fast.add_tokens([AddedToken("<tool>", normalized=False), AddedToken("</tool>", normalized=False)])
    return fast


@pytest.mark.slow
@pytest.mark.parametrize("first", [None, "always", "first"])
def test_llama_cpp_makes_the_same_ids_of_pieces(first: str | None, tmp_path: Path) -> None:
    file = sentence_pieces(tmp_path / "pieces", "bpe")
    tokenizer = of_pieces(file, first)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(file), add_bos=False)
    if first == "always":  # what is tried is SentencePiece's own tokenizer
        plain = [text for text in TEXTS if "<" not in text and "\u0000" not in text]
        assert [tokenizer(t, add_special_tokens=False).input_ids for t in plain] == [theirs.encode(t) for t in plain]
    copy = export_gguf(save(tokenizer, tmp_path / "model"), tmp_path / "out", to="f32")
    behind = {"<|im_start|>user\nhi<|im_end|>\n", "<tool>x</tool> y", PROBE} if first == "first" else set()
    assert bool(copy.notes) == (first == "first")
    with opened(copy.file) as llama:
        unlike = differing(llama, tokenizer)
        assert set(unlike) <= behind, unlike
        assert not set(differing(llama, tokenizer, special=True)) - behind


@pytest.mark.slow
def test_llama_cpp_makes_the_same_ids_of_unigrams(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(
        CORPUS, trainers.UnigramTrainer(vocab_size=800, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    copy = export_gguf(save(fast, tmp_path / "model"), tmp_path / "out", to="f32")
    with opened(copy.file) as llama:
        unlike = differing(llama, fast)
        assert not unlike, unlike


def test_another_way_of_cutting_is_refused_unless_it_is_named(tmp_path: Path) -> None:
    tokenizer = bytes_cut(Way("own", (r"\p{L}", r"\s+")))
    save(tokenizer, tmp_path / "model")
    with pytest.raises(InputError, match="cuts texts in a way that is not recognised.*--pre"):
        export_gguf(tmp_path / "model", tmp_path / "out")
    with pytest.raises(InputError, match=r"'llama-bp' is none of llama.cpp's ways.*did you mean 'llama-bpe'"):
        export_gguf(tmp_path / "model", tmp_path / "out", pre="llama-bp")
    assert export_gguf(tmp_path / "model", tmp_path / "out", pre="olmo").file.is_file()


def test_rows_without_a_token_are_unused_and_tokens_without_a_row_are_refused(tmp_path: Path) -> None:
    tokenizer = bytes_cut(WAYS[0])
    copy = export_gguf(save(tokenizer, tmp_path / "padded", len(tokenizer) + 5), tmp_path / "out", to="f32")
    with opened(copy.file) as llama:
        assert llama.rows == len(tokenizer) + 5
        assert llama.pieces([len(tokenizer)]) == [""] or llama.pieces([len(tokenizer)]) == [f"[PAD{len(tokenizer)}]"]
        assert not differing(llama, tokenizer)
    save(tokenizer, tmp_path / "short", len(tokenizer) - 1)
    with pytest.raises(InputError, match=r"tokens and the model rows for .*: </tool> would have none"):
        export_gguf(tmp_path / "short", tmp_path / "out2")


def test_kinds_that_llama_cpp_does_not_have_are_refused(tmp_path: Path) -> None:
    words = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    save(PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", eos_token="a"), tmp_path / "words")
    with pytest.raises(InputError, match="is a WordPiece tokenizer of a kind"):
        export_gguf(tmp_path / "words", tmp_path / "out")
    file = sentence_pieces(tmp_path / "pieces", "bpe")
    tokenizer = of_pieces(file, None)
    save(tokenizer, tmp_path / "no bytes")
    about = json.loads((tmp_path / "no bytes" / "tokenizer.json").read_text())
    about["model"]["vocab"] = {token.replace("<0x41>", "<other>"): i for token, i in about["model"]["vocab"].items()}
    (tmp_path / "no bytes" / "tokenizer.json").write_text(json.dumps(about))
    with pytest.raises(InputError, match="no tokens for single bytes"):
        export_gguf(tmp_path / "no bytes", tmp_path / "out")


def test_a_name_that_llama_cpp_takes_for_phi_3_is_left_out(tmp_path: Path) -> None:
    copy = export_gguf(save(bytes_cut(WAYS[0]), tmp_path / "model"), tmp_path / "my-phi-3-run", to="f32")
    with opened(copy.file) as llama:  # which looks for Phi-3's tokens where a model is called so
        assert llama.ids("a")


def test_every_token_that_ends_an_answer_ends_it(tmp_path: Path) -> None:
    folder = save(bytes_cut(WAYS[0]), tmp_path / "model")
    ends = {1, 4, 40}
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": sorted(ends)}))
    copy = export_gguf(folder, tmp_path / "out", to="f32")
    with opened(copy.file) as llama:
        assert ends <= llama.ends()
