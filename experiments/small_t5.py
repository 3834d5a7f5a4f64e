"""A small T5, pre-trained from nothing on the descriptions of Debian's packages, since no package ships one.

    python experiments/small_t5.py    make it, if it is not there, in the cache folder

4 + 4 layers of width 256 (T5 1.0: ReLU, tied embeddings), a byte-level BPE of 6,144 tokens of its own, 9 million
parameters. Several tasks in turns, as T5 was trained (arXiv 1910.10683): spans of a description are masked and have to
be written (15 % of its tokens, 3 a span), the synopsis of a description has to be written (every other step), and a
synopsis has to be repeated, which soon teaches it to look at what it copies. Only of sections that are no languages'
libraries: :data:`texts.LIBRARIES` it has never read.
"""

import random
import time
from pathlib import Path

import texts
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn.utils.rnn import pad_sequence
from transformers import Adafactor, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from halfbyte.files import whole_folder

VOCABULARY, SENTINELS = 6144, 24
STEPS, ROWS, RATE = 1200, 32, 2e-2
READ, WRITTEN = 48, 24
"""Tokens of a source and of a target, at most."""
PAD, END = "<pad>", "</s>"


def tokenizer_of(lines: list[str], size: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE that ends each text, with the sentinels of masked spans."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    special = [PAD, END, *(f"<extra_id_{i}>" for i in range(SENTINELS))]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, tokenizer.token_to_id(END))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=END)


def new_model(tokenizer: PreTrainedTokenizerFast, width: int = 256, layers: int = 4) -> T5ForConditionalGeneration:
    """Return a T5 of random weights; the global generator decides them."""
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=len(tokenizer), d_model=width, d_kv=width // 4, d_ff=4 * width, num_layers=layers, num_heads=4,
            dropout_rate=0.0, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
            decoder_start_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip


def masked(ids: list[int], sentinels: list[int], end: int, dice: random.Random) -> tuple[list[int], list[int]]:
    """Replace spans of 3 tokens, 15 % in all, by sentinels; return the rest and what the spans held."""
    spans = max(1, min(round(len(ids) * 0.15 / 3), len(sentinels), len(ids) // 4))
    gaps = sorted(dice.sample(range(len(ids) - 3 * spans + 1), spans))
    source, target, done = [], [], 0
    for number, gap in enumerate(gaps):
        start = gap + 3 * number
        source += [*ids[done:start], sentinels[number]]
        target += [sentinels[number], *ids[start : start + 3]]
        done = start + 3
    return [*source, *ids[done:], end], [*target, end]


def train(
    rows: list[texts.Row], tokenizer: PreTrainedTokenizerFast, model: T5ForConditionalGeneration, steps: int
) -> None:
    """Train it, in fp32 with products in bf16; the rate rises for 50 steps and then falls to zero.

    Steps are in parts of each weight's size (Adafactor, arXiv 1804.04235), as T5 was trained: its queries begin so
    small that AdamW's steps of one size for all are too long for them, and it learns no more than how often words are.
    """
    dice, end, pad = random.Random(0), tokenizer.eos_token_id, tokenizer.pad_token_id
    sentinels = tokenizer.convert_tokens_to_ids([f"<extra_id_{i}>" for i in range(SENTINELS)])
    sources = tokenizer([row.source for row in rows], truncation=True, max_length=READ)["input_ids"]
    targets = tokenizer([row.target for row in rows], truncation=True, max_length=WRITTEN)["input_ids"]
    optimizer = Adafactor(model.parameters(), lr=RATE, scale_parameter=True, relative_step=False)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 50, (steps - step) / max(1, steps - 50))
    )
    order: list[int] = []
    began = time.perf_counter()
    model.train()
    for step in range(steps):
        if len(order) < ROWS:
            order = dice.sample(range(len(rows)), len(rows))
        batch, order = order[:ROWS], order[ROWS:]
        task = ("spans", "synopsis", "repeat", "synopsis")[step % 4]
        if task == "spans":
            pairs = [masked(sources[i][:-1], sentinels, end, dice) for i in batch]
        else:
            pairs = [(sources[i] if task == "synopsis" else targets[i], targets[i]) for i in batch]
        ids = pad_sequence([torch.tensor(source) for source, _ in pairs], True, pad)
        labels = pad_sequence([torch.tensor(target) for _, target in pairs], True, -100)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, attention_mask=(ids != pad).long(), labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 < 4 or step == steps - 1:
            print(f"step {step}: loss {loss.item():.3f} ({task}), {time.perf_counter() - began:.0f} s", flush=True)


def small_t5() -> Path:
    """Return the folder of the model, which is trained first if it is not there (10 to 15 minutes of one core)."""
    folder = texts.kept("small-t5")
    if not folder.is_dir():
        rows = [row for row in texts.synopses() if row.kind not in texts.LIBRARIES]
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # sums are the same on any number of cores
        torch.manual_seed(0)
        tokenizer = tokenizer_of([text for row in rows for text in (row.source, row.target)])
        model = new_model(tokenizer)
        train(rows, tokenizer, model, STEPS)
        torch.set_num_threads(threads)
        with whole_folder(folder) as part:
            model.save_pretrained(part)
            tokenizer.save_pretrained(part)
    return folder


if __name__ == "__main__":
    print(small_t5())
