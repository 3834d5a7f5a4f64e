"""textgenrnn: a published language model over characters, in fp32 (M. Woolf, MIT), rebuilt in torch.

Two LSTMs of 128 cells over embeddings of width 100; what is told of the next character is the average of embeddings and
states over the last 40 characters, by learnt weights. Its author trained it on posts of Reddit. Its file is Keras's, in
cuDNN's layout: a gate's input matrix lies output by input, its recurrent one too, and there are two biases, which add.
"""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from corpus import Losses
from torch import Tensor, nn
from torch.nn import functional as F

from halfbyte.example.sources import Source, download, extract
from halfbyte.files import whole_folder

SOURCE = Source("textgenrnn==2.0.0", "c2b6f1c201c76d5a6021079e95a8db499bbe15d9f3448d33cb51c0cd496c86f8", ())
SEEN, SHORT = 40, 150
"""Characters that it looks back on, and those of each text that it is asked."""


class CharRNN(nn.Module):
    """The network; of each cell the layers that read its input and its state, ``[4 * 128, ...]``: gates i, f, g, o."""

    def __init__(self, vocabulary: dict[str, int], width: int = 100, state: int = 128) -> None:
        super().__init__()
        self.vocabulary, self.state = vocabulary, state
        self.embedding = nn.Embedding(len(vocabulary) + 1, width)
        self.reads = nn.ModuleList(nn.Linear(size, 4 * state) for size in (width, state))
        self.recurs = nn.ModuleList(nn.Linear(state, 4 * state, bias=False) for _ in range(2))
        self.attention = nn.Linear(width + 2 * state, 1, bias=False)
        self.output = nn.Linear(width + 2 * state, len(vocabulary) + 1)

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
        logits: Tensor = self.output((share * together).sum(dim=1))
        return logits

    def cells(self) -> dict[str, Tensor]:
        """Return the weights that are rounded, the cells'. The attention is a vector, the output the head."""
        parts = {"reads": self.reads, "recurs": self.recurs}
        return {f"{name}.{i}": layer.weight.data for name, part in parts.items() for i, layer in enumerate(part)}


def published(folder: Path) -> CharRNN:
    """Return the network with its author's weights, downloaded into ``folder`` unless they are there."""
    import h5py

    if not folder.is_dir():
        with whole_folder(folder) as part, tempfile.TemporaryDirectory() as place:
            archive = download(SOURCE, Path(place))
            for name in ("textgenrnn_weights.hdf5", "textgenrnn_vocab.json"):
                extract(archive, f"textgenrnn-2.0.0/textgenrnn/{name}", part / name)
    model = CharRNN(json.loads((folder / "textgenrnn_vocab.json").read_text(encoding="utf-8")))
    with h5py.File(folder / "textgenrnn_weights.hdf5") as file, torch.no_grad():

        def stored(layer: str, name: str) -> Tensor:
            return torch.from_numpy(file[f"{layer}/{layer}/{name}:0"][:])

        model.embedding.weight.copy_(stored("embedding", "embeddings"))
        model.attention.weight.copy_(stored("attention", "attention_W").T)
        model.output.weight.copy_(stored("output", "kernel").T)
        model.output.bias.copy_(stored("output", "bias"))
        for i, (reads, recurs) in enumerate(zip(model.reads, model.recurs, strict=True), start=1):
            gates = stored(f"rnn_{i}", "kernel").chunk(4, dim=1)
            reads.weight.copy_(torch.cat([gate.reshape(gate.shape[::-1]) for gate in gates]))
            reads.bias.copy_(stored(f"rnn_{i}", "bias").view(2, -1).sum(dim=0))
            recurs.weight.copy_(torch.cat(stored(f"rnn_{i}", "recurrent_kernel").chunk(4, dim=1)))
    return model.eval()


@torch.no_grad()
def char_losses(model: CharRNN, read: Sequence[str]) -> Losses:
    """Return the loss of the first characters of each text, each behind the forty before it."""
    nats, counts = [], []
    for text in read:
        known = [model.vocabulary.get(character, 0) for character in text[:SHORT]]
        ids = torch.tensor([0] * (SEEN - 1) + [model.vocabulary["<s>"], *known])
        nats.append(F.cross_entropy(model(ids[:-1].unfold(0, SEEN, 1)), ids[SEEN:], reduction="sum").item())
        counts.append(len(known))
    return nats, counts
