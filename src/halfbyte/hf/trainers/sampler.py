"""The order of the training rows: a function of the seed and the epoch alone.

Transformers (5.23) draws it from the global random state when lengths are grouped, so that a run resumed within an
epoch would go on through another order.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices


class EpochSampler(Sampler[int]):
    """A shuffled order of the rows, given by the seed and the epoch.

    Args:
        lengths: tokens of each row.
        group: rows per optimizer step, among which lengths are to be similar; ``None`` does not look at lengths.
        seed: of the run, below 2**32.
    """

    def __init__(self, lengths: Sequence[int] | np.ndarray[Any, Any], group: int | None, seed: int) -> None:
        self.lengths = lengths
        self.group = group
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Any:
        # torch's generator on a CPU takes 32 bits, so the two numbers are hashed into as many
        mixed = int(np.random.SeedSequence((self.seed, self.epoch)).generate_state(1)[0])
        generator = torch.Generator().manual_seed(mixed)
        if self.group:
            return iter(get_length_grouped_indices(self.lengths, self.group, generator=generator))
        return iter(torch.randperm(len(self.lengths), generator=generator).tolist())

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate's data loader before each pass."""
        self.epoch = epoch
