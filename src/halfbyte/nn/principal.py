"""The part of a matrix that a low rank holds best: ``M ≈ B A``, whole or by random projection.

Of a singular value decomposition ``M = U S Vᵀ`` the largest ``rank`` values give ``B = U √S`` and ``A = √S Vᵀ``, the
nearest matrix of that rank (Eckart and Young). The whole decomposition takes time cubic in the sides. The random one
(arXiv 0909.4061, algorithms 4.4 and 5.1) looks for the range of M in ``rank + OVERSAMPLED`` random directions,
sharpened by ``iterations`` of ``M Mᵀ``, and decomposes M within it: a few products of M with a thin matrix. Its error
comes from singular values that lie near the last one kept, of which it may keep another: it matters little which.
"""

import torch
from torch import Tensor

OVERSAMPLED = 10
"""Random directions beyond the rank."""


@torch.no_grad()
def principal(matrix: Tensor, rank: int, iterations: int | None, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return the factors ``B`` and ``A`` of the nearest matrix of a low rank, each with half of every singular value.

    Args:
        matrix: ``[out, in]``, fp32.
        rank: at most the smaller side.
        iterations: of the random decomposition; None for the whole one.
        seed: of the random directions; the same gives the same factors.

    Returns:
        ``B [out, rank]`` and ``A [rank, in]``, fp32 and contiguous.
    """
    thin = rank + OVERSAMPLED
    if iterations is None or 2 * thin >= min(matrix.shape):
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    else:
        basis = _range(matrix, thin, iterations, seed)
        u, s, vh = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
        u = basis @ u
    root = s[:rank].sqrt()
    return (u[:, :rank] * root).contiguous(), (root.unsqueeze(1) * vh[:rank]).contiguous()


def _range(matrix: Tensor, width: int, iterations: int, seed: int) -> Tensor:
    """Return an orthonormal basis, ``[out, width]``, of nearly the space in which M's largest directions end."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(matrix.shape[1], width, generator=generator, dtype=torch.float32).to(matrix.device)
    basis: Tensor = torch.linalg.qr(matrix @ start)[0]
    for _ in range(iterations):
        back: Tensor = torch.linalg.qr(matrix.T @ basis)[0]
        basis = torch.linalg.qr(matrix @ back)[0]
    return basis
