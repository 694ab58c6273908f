"""Clipped softmax in attention (arXiv:2306.12929, section 4.1; as a guard in arXiv:2410.16682)."""

from dataclasses import dataclass
from typing import Annotated, Any

from annotated_types import Ge, Le
from torch import Tensor

from metier.core.attention import map_probabilities
from metier.core.part import part


@part("model/soft-clip", paper="arXiv:2410.16682", rows=(9,))
def soft_clip(model: Any, *, zeta: Annotated[float, Ge(1)] = 1.03, gamma: Annotated[float, Le(0)] = -0.03) -> Any:
    """Attention weights are ``clip((zeta - gamma) p + gamma, 0, 1)`` of the probabilities ``p = softmax(z + mask)``.

    Weights below ``-gamma / (zeta - gamma)`` become exactly 0, those above ``(1 - gamma) / (zeta - gamma)`` exactly 1, so
    a head can do nothing, or copy, with finite logits; clipped ones get no gradient. Rows are not renormalised: with the
    default, a row of ``n`` equal weights sums to ``1.06 - 0.03 n``, to 0 from ``n = 36`` on (the first paper therefore
    lets ``gamma`` shrink with the length: ``-alpha / T``). Dropout comes after the clipping.

    No parameters, no state. Cost: attention in plain matrix products instead of a fused kernel; 22 % of forward and
    backward (measured as for qk-norm), more for longer rows. ``zeta = 1, gamma = 0`` is plain attention. Changes
    ``model`` in place and returns it. Raises ``UsageError`` for attention that does not go through transformers'
    interface.
    """
    map_probabilities(model, Clip(zeta, gamma), "model/soft-clip")
    return model


@dataclass(frozen=True)
class Clip:
    """``clip((zeta - gamma) p + gamma, 0, 1)``."""

    zeta: float
    gamma: float

    def __call__(self, p: Tensor) -> Tensor:
        """Probabilities of any shape -> the same shape."""
        return ((self.zeta - self.gamma) * p + self.gamma).clamp(0, 1)
