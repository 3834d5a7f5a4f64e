"""Questions with a few possible answers: how often the model prefers the right one, and how surprised it is by it.

For a row of token ids whose labelled part is the answer ``a₁ … aₙ`` (its stop token included) to the prompt ``p``:

    loss      mean of −log P(aᵢ | p, a₁ … aᵢ₋₁) over the answers' tokens of all rows, in nats
    accuracy  share of rows in which P(a₁ | p) is greater than that of every other answer's first token

The possible answers are those that occur in the rows, or are given. They are told apart by their first token, so one
forward pass over the row with its right answer gives both figures; answers that begin alike count as one. Rows of
similar length share a batch, and the output head is evaluated only at the columns in which some row of the batch has a
label.

Left out: choices told by the likelihood of their whole text, which takes a pass per choice, and models whose
``forward`` has no ``logits_to_keep``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from halfbyte.choices import IGNORED
from halfbyte.data import Collator, Row

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class ChoiceScore:
    """What :func:`score_choices` measured.

    Attributes:
        accuracy: share of the rows, 0 to 1.
        loss: mean negative log-likelihood per answer token, in nats.
        rows: how many there were.
        tokens: answer tokens in all of them.
        right: of each row, whether the right answer was preferred.
    """

    accuracy: float
    loss: float
    rows: int
    tokens: int
    right: tuple[bool, ...] = ()


@torch.no_grad()  # not inference mode: a model that is trained on remembers what it made here
def score_choices(
    model: "PreTrainedModel | PeftModel",
    rows: Sequence[Row],
    *,
    batch_size: int = 32,
    choices: Sequence[int] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ChoiceScore:
    """Measure how well ``model`` answers the questions in ``rows``.

    Args:
        model: a causal language model in evaluation mode.
        rows: at least one, from :func:`halfbyte.data.tokenize`; of several answers in a row the first one is chosen
            between, and all count for the loss.
        batch_size: rows per forward pass.
        choices: first tokens of the possible answers; None: those that occur.
        progress: called with the numbers of rows done and in all.
    """
    seen = [(len(row["input_ids"]), _first_label(row)) for row in rows]
    firsts = sorted({label for _, label in seen}) if choices is None else list(choices)
    possible = torch.tensor(firsts, device=model.device)
    by_length = sorted(range(len(seen)), key=lambda number: seen[number][0], reverse=True)
    collate = Collator(pad_token_id=None)
    right = [False] * len(rows)
    tokens, surprise = 0, 0.0
    for start in range(0, len(by_length), batch_size):
        numbers = by_length[start : start + batch_size]
        batch = collate(rows[number] for number in numbers)
        batch = {name: values.to(model.device) for name, values in batch.items()}
        targets = batch.pop("labels")[:, 1:]
        columns = (targets != IGNORED).any(0).nonzero().squeeze(1)
        targets = targets[:, columns]
        logits = model(**batch, logits_to_keep=columns, use_cache=False).logits
        labelled = targets != IGNORED
        surprise += torch.nn.functional.cross_entropy(
            logits[labelled].float(), targets[labelled], reduction="sum"
        ).item()
        tokens += int(labelled.sum())
        first = labelled.int().argmax(1, keepdim=True)
        at_first = logits.take_along_dim(first.unsqueeze(2), 1).squeeze(1)
        preferred = possible[at_first[:, possible].argmax(1)]
        is_right = (preferred == targets.take_along_dim(first, 1).squeeze(1)).tolist()
        for number, hit in zip(numbers, is_right, strict=True):
            right[number] = hit
        if progress:
            progress(start + len(labelled), len(rows))
    return ChoiceScore(sum(right) / len(rows), surprise / tokens, len(rows), tokens, tuple(right))


def _first_label(row: Row) -> int:
    return next(int(label) for label in row["labels"] if label != IGNORED)
