"""The log-ratio modulated loss that a language model discovered."""

import torch
from torch import Tensor
from torch.nn import functional as F

from metier.core.batch import Pairs
from metier.core.part import Positive, part
from metier.core.preferences import log_ratios, reward_metrics

LARGEST = 80.0
"""``exp`` of more is not a float32."""


@part("objective/discopop", paper="arXiv:2406.08414, equation 5", needs=("reference",))
def discopop(b: Pairs, *, beta: Positive = 0.1, tau: Positive = 0.05) -> tuple[Tensor, dict[str, Tensor]]:
    """``(1-w)(-log σ(z)) + w exp(-z)`` with ``z = β(Δ_w - Δ_l)``, ``w = σ(z/τ)``, ``Δ = log π/π_ref``. Returns ``[B]``.

    Logistic for wrong pairs, exponential for right ones. It is not monotone: at the default τ it rises on about
    ``-0.119 < z < 0.071``. At the start, 0.8466 with slope ``+0.784`` in z, the margin therefore first goes *down*.
    The released recipes train with β 0.05. The exponent is kept below 80, where the weight is 0 long since; without this
    very wrong pairs give 0 · inf in float32, as they do in other implementations.
    """
    chosen, rejected = (beta * d for d in log_ratios(b))
    z = chosen - rejected
    w = torch.sigmoid(z / tau)
    loss = -torch.sigmoid(-z / tau) * F.logsigmoid(z) + w * torch.exp((-z).clamp(max=LARGEST))
    return loss, reward_metrics(chosen, rejected)


discopop.tags = ("constraint/divergence/generalisation",)  # type: ignore[attr-defined]
