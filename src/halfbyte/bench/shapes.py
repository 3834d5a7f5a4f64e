"""Models of known sizes with random weights, so that speed can be measured without a download.

Llama's architecture in the sizes of SmolLM2-135M, Qwen2.5-0.5B, Llama-3.2-1B and Llama-3.2-3B; bf16; heads tied to the
embeddings, as theirs are. The tokenizer has a token for each byte.
"""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

# hidden size, inner size, layers, heads, key/value heads, head size, vocabulary
SHAPES = {
    "135m": (576, 1536, 30, 9, 3, 64, 49_152),
    "0.5b": (896, 4864, 24, 14, 2, 64, 151_936),
    "1b": (2048, 8192, 16, 32, 8, 64, 128_256),
    "3b": (3072, 8192, 28, 24, 8, 128, 128_256),
}


def write_model(shape: str, folder: Path) -> None:
    """Write the model of :data:`SHAPES` called ``shape`` and its tokenizer to ``folder``."""
    hidden, inner, layers, heads, kv_heads, head_size, vocabulary = SHAPES[shape]
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_size,
        vocab_size=vocabulary,
        max_position_embeddings=131_072,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = LlamaForCausalLM(config)
        finally:
            torch.set_default_dtype(before)
    model.save_pretrained(folder, max_shard_size="2GB")
    tokenizer.save_pretrained(folder)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token for each byte, and one that ends and pads."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")
