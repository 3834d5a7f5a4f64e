"""llama.cpp makes of a text the ids that transformers' tokenizer makes of it."""

import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from llama import CACHE, Llama, opened
from made_tokenizers import CORPUS, HINDI, SPECIAL, TEXTS, bytes_cut, of_pieces, save, sentence_pieces
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from halfbyte.deploy.export.gguf import export_gguf
from halfbyte.errors import InputError
from halfbyte.hf.models.gguf_form.splits import PROBE, WAYS, WITHOUT_MARKS, Way, way_of


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


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
def test_llama_cpp_makes_the_same_ids_of_bytes(way: Way, tmp_path: Path) -> None:
    tokenizer = bytes_cut(way)
    copy = export_gguf(save(tokenizer, tmp_path / "model"), tmp_path / "out", to="f32")
    with opened(copy.file) as llama:
        unlike = differing(llama, tokenizer)
    assert set(unlike) <= ({HINDI, PROBE} if way.name in WITHOUT_MARKS else set()), unlike
    assert copy.notes == [] or "as Hindi has them" in copy.notes[0]


@pytest.mark.slow
def test_llama_cpp_makes_the_same_ids_with_a_real_tokenizer(tmp_path: Path) -> None:
    folder = CACHE / "SmolLM2-135M-Instruct"
    if not folder.is_dir():
        pytest.skip("the quick start's model is not here")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    copy = export_gguf(save(tokenizer, tmp_path / "model"), tmp_path / "out", to="f32")
    with opened(copy.file) as llama:
        assert not differing(llama, tokenizer)
        assert llama.template() == tokenizer.chat_template
        chat = tokenizer.apply_chat_template([{"role": "user", "content": text} for text in TEXTS], tokenize=False)
        assert llama.ids(chat) == tokenizer(chat, add_special_tokens=False).input_ids


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
    behind = {t for t in TEXTS if t.startswith((" ", "<"))} if first == "first" else set()
    assert [note[:86] for note in copy.notes] == (
        ["llama.cpp puts a space before a text that begins with one and before what follows a sp"] if behind else []
    )
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
    scores = [score for _, score in json.loads(tokenizer.to_str())["model"]["vocab"]]
    others = {
        text: both
        for text, both in unlike.items()
        if not text.startswith(" ") and "\u0000" not in text  # llama.cpp ends a piece at a zero
    }
    for found, wanted in others.values():  # two cuts of the same score, of which each takes another
        assert sum(scores[i] for i in found) == pytest.approx(sum(scores[i] for i in wanted), abs=1e-5), others
        assert fast.decode(found) == fast.decode(wanted)
    assert "llama.cpp puts a space before a text that begins with one" in copy.notes[0]


def test_another_way_of_cutting_is_refused_unless_it_is_named(tmp_path: Path) -> None:
    tokenizer = bytes_cut(Way("own", (r"\p{L}", r"\s+")))
    save(tokenizer, tmp_path / "model")
    with pytest.raises(InputError, match=r"cuts texts in a way that is not recognised.*--pre"):
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
