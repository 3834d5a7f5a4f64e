"""How well classes were told, from the right ones and those that a classifier named.

With ``n[i][j]`` the rows of class i that were called j, ``t`` the rows of each class, ``p`` those called so, s all:

    accuracy  Σ n[k][k] / s
    F1        of a class 2 n[k][k] / (t[k] + p[k]); "macro" is the mean over the classes that occur on either side
    Matthews  (s Σ n[k][k] − Σ t[k] p[k]) / √((s² − Σ p[k]²) (s² − Σ t[k]²)), 0 where that is not defined
              (Gorodkin 2004, doi 10.1016/j.compbiolchem.2004.09.006; of two classes it is the correlation of the two)
"""

import math
from collections.abc import Sequence

import torch


def label_scores(right: Sequence[int], named: Sequence[int]) -> dict[str, float]:
    """Return ``accuracy``, ``f1`` (macro) and ``matthews`` of the classes ``named`` where others are ``right``."""
    truth, guess = torch.tensor(right), torch.tensor(named)
    kinds = int(max(truth.max(), guess.max())) + 1
    n = torch.bincount(truth * kinds + guess, minlength=kinds**2).reshape(kinds, kinds).double()
    hits, t, p, s = n.diagonal(), n.sum(1), n.sum(0), n.sum()
    occurs = t + p > 0
    covariance = float(s * hits.sum() - (t * p).sum())
    spread = math.sqrt(float((s**2 - (p**2).sum()) * (s**2 - (t**2).sum())))
    return {
        "accuracy": float(hits.sum() / s),
        "f1": float((2 * hits[occurs] / (t + p)[occurs]).mean()),
        "matthews": covariance / spread if spread else 0.0,
    }
