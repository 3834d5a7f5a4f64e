"""Small Llamas, trained here from random weights on real text, since few packages ship language models in fp32.

Layers of width 256, a byte-level BPE of 2,048 tokens of its own; AdamW, 4 rows of 256 tokens a step, a cosine from
2e-3. Seeded; made once and kept in the cache folder.
"""

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from halfbyte.files import whole_folder

VOCABULARY, WIDTH, INNER, HEADS = 2048, 256, 768, 4
ROWS, LENGTH, RATE, WARM_UP = 4, 256, 2e-3, 100
END = "</s>"


def small_llama(folder: Path, layers: int, lines: Sequence[str], steps: int) -> Path:
    """Return the folder of a Llama, trained unless it is there.

    Args:
        folder: where it is kept.
        layers: how many; the seed too.
        lines: to train on.
        steps: how many.
    """
    if folder.is_dir():
        return folder
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _tokenizer(lines)
    torch.manual_seed(layers)
    end = tokenizer.eos_token_id
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=layers,
        num_attention_heads=HEADS, num_key_value_heads=HEADS, tie_word_embeddings=True, max_position_embeddings=1024,
        bos_token_id=None, eos_token_id=end, pad_token_id=end,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    rows = _rows(tokenizer, random.Random(layers).sample(lines, len(lines)))
    for step in range(steps):
        cosine = 0.52 + 0.48 * math.cos(math.pi * step / steps)
        optimizer.param_groups[0]["lr"] = RATE * min(1.0, (step + 1) / WARM_UP) * cosine
        batch = torch.tensor(list(itertools.islice(rows, ROWS)))
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 99:
            print(f"{folder.name}: step {step + 1} of {steps}, loss {loss.item():.3f}", flush=True)
    with whole_folder(folder) as part:
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
    return folder


def _tokenizer(lines: Sequence[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(lines[:20_000], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)


def _rows(tokenizer: Any, lines: Sequence[str]) -> Iterator[list[int]]:
    """Yield rows of tokens, texts behind each other, again from the first behind the last."""
    held: list[int] = [tokenizer.eos_token_id]
    for line in itertools.cycle(lines):
        held += [*tokenizer(line).input_ids, tokenizer.eos_token_id]
        while len(held) >= LENGTH:
            yield held[:LENGTH]
            held = held[LENGTH:]
