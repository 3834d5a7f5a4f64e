"""Tokenizers of each kind that llama.cpp has, trained on a small corpus, and texts that are hard on them."""

from importlib import resources
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from halfbyte.hf.models.gguf_form.splits import PROBE, Way

HINDI = "हिन्दी पाठ १२३"
TEXTS = (
    "", " ", "  ", "a", " a", "a ", "\n", "\n\n\n", "\t\tx", " \n \n", "Hello world",
    "  leading and   inner   spaces  ",
    "it's we'll they'VE I'M don't 'tis", "1 12 123 1234 12345 3.14159 1,000,000",
    "camelCase HTTPServer snake_case x1y2",
    "naïve café Ünïcödé", "e\u0301 a\u0308 o\u0302", "你好，世界。中文abc混合123",
    "テスト カタカナ ひらがな", "한국어 텍스트",
    "русский текст", "العربية نص", HINDI, "ภาษาไทย", "🙂🙃 👩‍👩‍👧‍👦 🇩🇪", "₿ $5 €6 ½ ² ⅷ",
    "\u00a0nbsp\u2003em\u200bzero",
    "def f(x):\n    return x**2  # comment\n\n\nprint(f(3))", "<b>bold</b> &amp; a/b\\c //// /* */ === --- ...",
    "line one\r\nline two\r\n\r\nline four", "tabs\t\tand \t mixed", "“quoted” «guillemets» — dash… ‽",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐍈 𓀀", "\u0000\u0001\u001f control", "a" * 70, "ab " * 40,
    "<|im_start|>user\nhi<|im_end|>\n", "<tool>x</tool> y",
    PROBE,
)  # fmt: skip
CORPUS = [*TEXTS * 4, *(resources.files("halfbyte.evaluate") / "general.txt").read_text("utf-8").splitlines()]
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
