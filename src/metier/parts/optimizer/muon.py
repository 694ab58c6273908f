"""Muon (Jordan et al. 2024): orthogonalized momentum for the hidden matrices; scaling of Liu et al.,
arXiv:2502.16982.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from metier.core.linalg import orthogonalize
from metier.core.optim import Rule, State, Step
from metier.core.part import Beta, Count, part


@part("optimizer/muon", paper="https://kellerjordan.github.io/posts/muon/")
@dataclass(frozen=True, kw_only=True)
class Muon(Rule):
    """Momentum whose singular values are all set near 1 by five Newton-Schulz iterations.

    ``m ← β m + (1-β) g``; ``nesterov``: ``β m + (1-β) g`` instead of m; direction ``s · NS(m)`` for a matrix
    ``[m, n]`` with ``s = √max(1, m/n)`` (``scale: spectral``, the original) or ``0.2 √max(m, n)`` (``rms``:
    entries as large as AdamW's, so its learning rate and weight decay carry over). ``precision`` is that of
    the iterations. State: one tensor like the matrix. Embeddings, head and all that is not 2-D go to AdamW.
    """

    matrices = True

    beta: Beta = 0.95
    nesterov: bool = True
    iterations: Count = 5
    scale: Literal["spectral", "rms"] = "rms"
    precision: Literal["fp32", "bf16"] = "fp32"

    @property
    def default_lr(self) -> float:  # type: ignore[override]
        """0.02 for ``spectral``, AdamW's for ``rms``."""
        return 0.02 if self.scale == "spectral" else 3e-4

    def init(self, p: Tensor) -> State:
        """Momentum at zero."""
        return {"m": torch.zeros_like(p)}

    def update(self, g: Tensor, p: Tensor, state: State, step: Step) -> Tensor:
        """The direction above, for a stack ``[k, m, n]``."""
        momentum = state["m"].lerp_(g, 1 - self.beta)
        x = g.lerp(momentum, self.beta) if self.nesterov else momentum
        low = x.bfloat16() if self.precision == "bf16" else x
        rows, cols = p.shape[-2:]
        factor = math.sqrt(max(1, rows / cols)) if self.scale == "spectral" else 0.2 * math.sqrt(max(rows, cols))
        return orthogonalize(low, self.iterations).to(p.dtype) * factor
