"""What the values of a model's dense tensors say, seen one tensor at a time: a few numbers are kept of each.

nothing      a matrix of zeros: it was never written, or lost in a conversion
the same     two matrices with the same values, though they are not tied
outliers     columns far larger than the others: 4 bits spend a block's range on them
range        values that float16 cannot hold, or that were cut off at its end
untrained    rows of embeddings that control tokens of the chat template have, and nobody trained
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from halfbyte.errors import named
from halfbyte.hf.models.stops import untrained
from halfbyte.hf.models.verify import Finding as Damage
from halfbyte.plan.doctor.finding import Finding

LARGEST_HALF = 65504.0
"""Of float16."""
OUTLIER = 30.0
"""How many times the median a column's root mean square is, to be told."""
PIECE = 2**22
"""Values that are looked at together, in fp32."""
SHOWN = 3


@dataclass
class Weights:
    """Sees dense tensors, and tells what was found.

    Attributes:
        embeddings: names of the tensors whose rows are tokens'.
        tokens: of which the rows are looked at, by their numbers.
        tied: names that stand for one tensor.
        looked_up: names of the tensors of which rows are taken, which are never in 4 bits.
        seen: how many matrices.
    """

    embeddings: Collection[str] = ()
    tokens: Mapping[int, str] = field(default_factory=dict)
    tied: Collection[str] = ()
    looked_up: Collection[str] = ()
    seen: int = 0
    _zeros: list[str] = field(default_factory=list)
    _outliers: dict[str, tuple[int, float]] = field(default_factory=dict)
    _too_large: dict[str, float] = field(default_factory=dict)
    _cut: list[str] = field(default_factory=list)
    _same: dict[tuple[object, ...], list[str]] = field(default_factory=dict)
    _untrained: dict[str, list[str]] = field(default_factory=dict)

    def __call__(self, name: str, tensor: Tensor) -> None:
        """See a tensor."""
        if tensor.ndim != 2 or not tensor.is_floating_point() or tensor.element_size() < 2 or not tensor.numel():
            return
        self.seen += 1
        rows, columns = tensor.shape
        squares = torch.zeros(columns, dtype=torch.float64)
        largest, total = 0.0, 0.0
        for part in torch.split(tensor, max(1, PIECE // columns)):
            values = part.float()
            squares += values.square().sum(0, dtype=torch.float64)
            largest = max(largest, float(values.abs().max()))
            total += float(values.sum(dtype=torch.float64))
        if largest == 0.0:
            self._zeros.append(name)
            return
        if largest > LARGEST_HALF:
            self._too_large[name] = largest
        if tensor.dtype == torch.float16 and largest == LARGEST_HALF:
            self._cut.append(name)
        sizes = (squares / rows).sqrt()
        middle = float(sizes.median())
        if name not in self.looked_up and middle > 0 and (ratio := float(sizes.max()) / middle) > OUTLIER:
            self._outliers[name] = int(sizes.argmax()), ratio
        if name not in self.tied:
            key = (rows, columns, largest, total, float(squares.sum()))
            self._same.setdefault(key, []).append(name)
        if name in self.embeddings:
            for token, text in self.tokens.items():
                if token < rows and (reason := untrained(tensor, token)):
                    self._untrained.setdefault(f"{text!r} ({reason})", []).append(name)

    def findings(self) -> Iterator[Finding]:
        """Yield what was found."""
        if self._zeros:
            yield Finding(
                "zeros",
                f"{_some(self._zeros)}: nothing but zeros",
                "Nothing passes through such a layer: it was lost when the model was converted or copied.",
                "Copy the model from its source again, or convert it anew.",
                "warning",
            )
        same = [names for names in self._same.values() if len(names) > 1]
        if same:
            yield Finding(
                "equal tensors",
                "; ".join(named(names) for names in same[:SHOWN]) + (" ..." if len(same) > SHOWN else ""),
                "They hold the same values: layers that were put in twice, as some merged models have them, or a copy "
                "that went wrong.",
                "Compare with the model's source, if this was not meant.",
                "note",
            )
        if self._outliers:
            worst = sorted(self._outliers.items(), key=lambda item: -item[1][1])
            listed = [f"column {column} of {name}, {ratio:,.0f} times" for name, (column, ratio) in worst[:SHOWN]]
            yield Finding(
                "outliers",
                f"{len(worst)} of {self.seen} matrices have columns far larger than their others ({'; '.join(listed)})",
                "64 values share one range in 4 bits: what stands beside such a column is rounded to little.",
                "halfbyte train --quant-type int8 ...  # or --blocksize 32; halfbyte train measures the loss before it "
                "begins, so compare the two",
                "note",
            )
        if self._too_large:
            value = max(self._too_large.values())
            yield Finding(
                "range",
                f"values up to {value:,.0f} in {_some(list(self._too_large))}",
                "float16 ends at 65,504: computed in it, the model gives infinities, and a loss that is no number.",
                "Leave compute_dtype at bfloat16.",
                "note",
            )
        if self._cut:
            yield Finding(
                "range",
                f"{_some(self._cut)} {'ends' if len(self._cut) == 1 else 'end'} exactly at 65,504, the end of float16",
                "Values beyond it were cut off when the model was converted.",
                "Take the model in bfloat16 or float32.",
                "warning",
            )
        if self._untrained:
            names = sorted({name for several in self._untrained.values() for name in several})
            yield Finding(
                "untrained tokens",
                f"{named(sorted(self._untrained))} of {named(names)}",
                "The chat template writes these tokens, and the model has never seen them: it may not learn to stop.",
                "Take a chat template that the model knows (--chat-template), or train the embeddings too: "
                "--modules-to-save embed_tokens,lm_head",
                "warning",
            )


def sentence_of(damage: Damage) -> str:
    """Return what ``halfbyte verify`` has found, the tensor's name once."""
    is_whole = damage.what.startswith(damage.place)
    return damage.what if is_whole else f"{damage.place} {damage.what}"


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
