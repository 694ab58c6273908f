"""AlphaPO: SimPO with another shape of the reward."""

import torch
from torch import Tensor
from torch.nn import functional as F

from metier.core.batch import Pairs
from metier.core.part import NonNegative, Positive, part
from metier.core.preferences import means, reward_metrics

LARGEST_EXPONENT = 60.0
"""``e^60`` times usual coefficients still fits float32, with its square root to spare for the gradient."""


@part("objective/alphapo", paper="arXiv:2501.03884")
def alphapo(
    b: Pairs, *, alpha: float = 0.25, beta: Positive = 2.5, gamma: NonNegative = 0.25
) -> tuple[Tensor, dict[str, Tensor]]:
    """``-log σ(β(r_w - r_l) - γ)``, ``r = (1 - p^{-α})/α``, ``p = exp(log π(y)/|y|)``. Returns ``[B]``.

    ``alpha`` = 0 is the limit ``r = log p`` (SimPO). α > 0: differences count more where answers are unlikely, α < 0 where
    they are likely (``r`` is then bounded below). ``p^{-α}`` is kept below ``e^60``: an answer beyond that has no gradient.
    The form is the card's, as remembered, and that of trl's CPO trainer, which it agrees with.
    """
    chosen, rejected = (beta * reward(a, alpha) for a in means(b))
    return -F.logsigmoid(chosen - rejected - gamma), reward_metrics(chosen, rejected)


alphapo.tags = ("constraint/reference/free", "model/generation/length")  # type: ignore[attr-defined]


def reward(mean_logp: Tensor, alpha: float) -> Tensor:
    """``(1 - exp(-α a))/α`` of token means ``a``; ``a`` at ``alpha`` 0."""
    if alpha == 0:
        return mean_logp
    return -torch.expm1((-alpha * mean_logp).clamp(max=LARGEST_EXPONENT)) / alpha
