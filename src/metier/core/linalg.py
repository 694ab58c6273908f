"""Linear algebra that several rules share, for stacks of matrices ``[…, m, n]``."""

import torch
from torch import Tensor

QUINTIC = (3.4445, -4.7750, 2.0315)
"""The steepest slope at 0 for which singular values still end near 1 (between about 0.7 and 1.2)."""
EPS = 1e-7


def orthogonalize(x: Tensor, steps: int) -> Tensor:
    """Roughly the nearest semi-orthogonal matrices to ``x`` ``[k, m, n]``, by Newton-Schulz.

    ``X ← aX + (bA + cA²)X`` with ``A = XXᵀ``, from ``x`` divided by its Frobenius norm; the coefficients are
    :data:`QUINTIC`.
    """
    a, b, c = QUINTIC
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=EPS)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
