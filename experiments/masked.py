"""What all-MiniLM-L6-v2 says of a text: the loss of masked tokens, by a head that is trained here.

The encoder comes without the head that it was pre-trained with. BERT's is trained on the outputs of the unquantized
encoder, which stays as it is; the head then stays as it is for every data type. So a data type is measured by what the
encoder's outputs have lost for telling a masked token, not by how good a masked language model MiniLM once was.
"""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from corpus import Losses
from formats import UNQUANTIZED, Format
from torch import Tensor, nn
from torch.nn import functional as F

from halfbyte.files import whole_folder

EVERY, OFFSETS = 7, (0, 3)
"""Every seventh token of a text is masked, beginning with the first, and once more beginning with the fourth."""
ROWS, LENGTH, SHARE = 24, 96, 0.2
"""Texts that are read at a time to train the head, their tokens at most, and how many of these are masked."""
BATCH, PASSES, RATE, WARM_UP = 512, 3, 2e-3, 20


class MaskedHead(nn.Module):
    """BERT's head for masked tokens: dense, GELU, norm, then the embeddings, which are not trained, and a bias."""

    embeddings: Tensor

    def __init__(self, embeddings: Tensor) -> None:
        super().__init__()
        width = embeddings.shape[1]
        self.dense, self.norm = nn.Linear(width, width), nn.LayerNorm(width)
        self.bias = nn.Parameter(torch.zeros(len(embeddings)))
        self.register_buffer("embeddings", embeddings, persistent=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return logits ``[tokens, vocabulary]`` of the encoder's outputs ``[tokens, width]``."""
        return F.linear(self.norm(F.gelu(self.dense(hidden))), self.embeddings, self.bias)


def encoder(folder: Path, kind: Format) -> Any:
    """Return the encoder in a folder, its linear layers in a format; it computes in fp32."""
    from transformers import AutoModel

    config = kind.config(torch.float32)
    return AutoModel.from_pretrained(folder, dtype=torch.float32, quantization_config=config).eval()


def masked_head(encoder_folder: Path, folder: Path, lines: Sequence[str], count: int) -> MaskedHead:
    """Return the head, trained unless it is there.

    Args:
        encoder_folder: of the encoder.
        folder: where the head is kept.
        lines: to train on.
        count: how many of them are read, up to 96 tokens of each, a fifth of which are masked.
    """
    from safetensors.torch import load_file, save_file

    model = encoder(encoder_folder, UNQUANTIZED)
    torch.manual_seed(0)
    head = MaskedHead(model.get_input_embeddings().weight.detach().clone())
    if not folder.is_dir():
        hidden, wanted = _masked(model, _tokenizer(encoder_folder), random.Random(0).sample(lines, count))
        _train(head, hidden, wanted)
        with whole_folder(folder) as part:
            save_file(dict(head.state_dict()), part / "head.safetensors")
    head.load_state_dict(load_file(folder / "head.safetensors"))
    return head.eval()


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def _masked(model: Any, tokenizer: Any, lines: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Return the encoder's outputs where tokens are masked, ``[tokens, width]``, and these tokens."""
    special = torch.tensor(tokenizer.all_special_ids)
    outputs, wanted = [], []
    for first in range(0, len(lines), ROWS):
        rows = lines[first : first + ROWS]
        read = tokenizer(rows, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt")
        chosen = (torch.rand(read.input_ids.shape) < SHARE) & ~torch.isin(read.input_ids, special)
        ids = read.input_ids.masked_fill(chosen, tokenizer.mask_token_id)
        outputs.append(model(input_ids=ids, attention_mask=read.attention_mask).last_hidden_state[chosen])
        wanted.append(read.input_ids[chosen])
    return torch.cat(outputs), torch.cat(wanted)


def _train(head: MaskedHead, hidden: Tensor, wanted: Tensor) -> None:
    counts = torch.bincount(wanted, minlength=len(head.bias))
    head.bias.data.copy_(((counts + 0.1) / (len(wanted) + 0.1 * len(counts))).log())
    optimizer = torch.optim.AdamW(head.parameters(), lr=RATE, weight_decay=0.01)
    batches = [batch for _ in range(PASSES) for batch in torch.randperm(len(wanted)).split(BATCH)]
    for step, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = RATE * min(1.0, (step + 1) / WARM_UP) * (1 - step / len(batches))
        loss = F.cross_entropy(head(hidden[batch]), wanted[batch])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 49:
            print(f"head: step {step + 1} of {len(batches)}, loss {loss.item():.3f}", flush=True)


@torch.no_grad()
def masked_losses(model: Any, head: MaskedHead, tokenizer: Any, read: Sequence[str]) -> Losses:
    """Return the loss of the masked tokens of each text."""
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
