"""The numbers of one AdamW step."""

from typing import NamedTuple


class AdamwStep(NamedTuple):
    """The numbers of one AdamW step (arXiv 1711.05101, algorithm 2).

    Attributes:
        number: t, 1 for the first step of the tensors that are stepped.
        lr: the learning rate.
        betas: how much of the first and of the second moment is kept.
        eps: added to the root of the second moment.
        weight_decay: times ``lr``, what a parameter loses of itself.
    """

    number: int
    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
