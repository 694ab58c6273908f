"""Listwise preference optimization with lambda weights (LiPO-λ)."""

import torch
from torch import Tensor
from torch.nn import functional as F

from metier.core.batch import Lists
from metier.core.errors import UsageError
from metier.core.part import Positive, part
from metier.core.preferences import better, list_metrics, log_ratio

LARGEST = 64.0
"""Scores beyond this make gains ``2^r`` that leave no digits for the rest."""


@part(
    "objective/lipo",
    paper="arXiv:2402.01878, LiPO-λ, as remembered",
    needs=("reference",),
)
def lipo(b: Lists, *, beta: Positive = 0.1) -> tuple[Tensor, dict[str, Tensor]]:
    """``Σ_{r_i > r_j} Δ_ij log(1 + e^{-(R_i - R_j)})`` with ``R = β log π/π_ref``. Returns ``[B]``.

    ``Δ_ij = |2^{r_i} - 2^{r_j}| |1/log(1+rank_i) - 1/log(1+rank_j)|`` is how much the list's discounted gain would change if
    the two traded places in the order by ``R``; it carries no gradient. Where ``R`` ties, as everywhere at the start of
    training, the better score ranks first. Gains are exponential in the score: the paper's scores are in ``[0, 1]``; raises
    ``UsageError`` beyond ±64.
    """
    largest = float(b.score.masked_fill(~b.present, 0.0).abs().max())
    if largest > LARGEST:
        raise UsageError(
            f"a score of {largest:g} is too large for gains 2^score", where="lipo", hint="Rescale the scores to [0, 1]."
        )
    reward = beta * log_ratio(b)
    gain, discount = torch.exp2(b.score), _discount(reward.detach(), b)
    weight = (gain.unsqueeze(2) - gain.unsqueeze(1)).abs() * (discount.unsqueeze(2) - discount.unsqueeze(1)).abs()
    pair = F.softplus(-(reward.unsqueeze(2) - reward.unsqueeze(1)))
    return (weight * pair).masked_fill(~better(b), 0.0).sum((1, 2)), list_metrics(reward, b)


lipo.tags = ("data/feedback/list", "data/quality/gap")  # type: ignore[attr-defined]


def _discount(reward: Tensor, b: Lists) -> Tensor:
    """``1/log(1 + rank)`` in the order by reward, then by score, ``[B, K]``; answers equal in both share their places."""
    ahead = reward.unsqueeze(1) - reward.unsqueeze(2)  # [B, i, j]: j minus i
    level, lead = ahead == 0, b.score.unsqueeze(1) - b.score.unsqueeze(2)
    exists = b.present.unsqueeze(1)
    before = (exists & ((ahead > 0) | (level & (lead > 0)))).sum(2)
    equal = (exists & level & (lead == 0)).sum(2).clamp(min=1)
    places = torch.arange(1, reward.shape[1] + 1, device=reward.device, dtype=reward.dtype)
    summed = F.pad((1 / torch.log1p(places)).cumsum(0), (1, 0))
    last = (before + equal).clamp(max=reward.shape[1])
    return (summed[last] - summed[before]) / equal
