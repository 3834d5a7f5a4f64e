"""Models of known sizes with random weights, so that speed can be measured without a download.

Llama's architecture in the sizes of SmolLM2-135M, Qwen2.5-0.5B, Llama-3.2-1B and Llama-3.2-3B; bf16; heads tied to the
embeddings, as theirs are. The tokenizer has a token for each byte. Those of Llama-2-7B and Llama-3-70B, whose heads are
not tied, are only written in 4 bits: random bytes, since there are no weights to be quantized.
"""

import math
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from halfbyte.choices import BLOCKSIZE
from halfbyte.hf.models.config import HalfbyteConfig
from halfbyte.hf.models.shards import write_shards
from halfbyte.kernels import Nested, Statistics
from halfbyte.quant import QuantizedWeight
from halfbyte.quant.codebooks import codebook
from halfbyte.quant.double_quant import NESTED_BLOCKSIZE

# hidden size, inner size, layers, heads, key/value heads, head size, vocabulary
SHAPES = {
    "135m": (576, 1536, 30, 9, 3, 64, 49_152),
    "0.5b": (896, 4864, 24, 14, 2, 64, 151_936),
    "1b": (2048, 8192, 16, 32, 8, 64, 128_256),
    "3b": (3072, 8192, 28, 24, 8, 128, 128_256),
}


LARGE = {
    "7b": (4096, 11008, 32, 32, 32, 128, 32_000),
    "70b": (8192, 28_672, 80, 64, 8, 128, 128_256),
}


def write_model(shape: str, folder: Path) -> None:
    """Write the model of :data:`SHAPES` called ``shape`` and its tokenizer to ``folder``."""
    tokenizer = byte_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = LlamaForCausalLM(_config(shape, tokenizer))
        finally:
            torch.set_default_dtype(before)
    model.save_pretrained(folder, max_shard_size="2GB")
    tokenizer.save_pretrained(folder)


def write_4bit_model(shape: str, folder: Path, progress: Callable[[int, int], None] | None = None) -> None:
    """Write the model of :data:`SHAPES` or :data:`LARGE` called ``shape`` to ``folder``, doubly quantized NF4.

    Codes and block constants are random bytes, so that it takes as long as the disk; products of them have about the
    size that those of a model at its beginning have.

    Args:
        shape: its name.
        folder: new or empty.
        progress: called with tensors written and tensors in all.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = byte_tokenizer()
    config = _config(shape, tokenizer)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    linears = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"}
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    generator = torch.Generator().manual_seed(0)

    def make(name: str) -> dict[str, torch.Tensor]:
        if name in linears:
            return _random_weight(shapes[name], generator).state_dict(name)
        if len(shapes[name]) == 1:
            return {name: torch.ones(shapes[name], dtype=torch.bfloat16)}
        return {name: torch.randn(shapes[name], generator=generator).mul_(0.02).bfloat16()}

    sizes = {name: math.prod(shape) // 2 if name in linears else 2 * math.prod(shape) for name, shape in shapes.items()}
    write_shards(folder, sizes, make, progress)
    config.quantization_config = HalfbyteConfig().to_dict()
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = torch.bfloat16
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _random_weight(shape: torch.Size, generator: torch.Generator) -> QuantizedWeight:
    blocks = math.prod(shape) // BLOCKSIZE
    packed, absmax = (
        torch.randint(2**63 - 1, (-(-count // 8),), generator=generator).view(torch.uint8)[:count]
        for count in (math.prod(shape) // 2, blocks)
    )
    of_constants = torch.full((-(-blocks // NESTED_BLOCKSIZE),), 0.005)
    nested = Nested(of_constants, codebook("dynamic"), NESTED_BLOCKSIZE, 0.03)
    statistics = Statistics(absmax, codebook("nf4"), BLOCKSIZE, nested)
    return QuantizedWeight(packed.view(-1, 1), statistics, shape, "nf4", torch.bfloat16)


def _config(shape: str, tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    hidden, inner, layers, heads, kv_heads, head_size, vocabulary = (SHAPES | LARGE)[shape]
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_size,
        vocab_size=vocabulary,
        max_position_embeddings=131_072,
        tie_word_embeddings=shape in SHAPES,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token for each byte, and one that ends and pads."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")
