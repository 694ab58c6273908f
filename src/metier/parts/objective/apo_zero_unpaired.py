"""Anchored preference optimization (zero) on single answers marked good or bad."""

import torch
from torch import Tensor

from metier.core.batch import Rated
from metier.core.part import NonNegative, Positive, part
from metier.core.preferences import log_ratio, rated_metrics


@part(
    "objective/apo-zero-unpaired",
    paper="arXiv:2408.06266, equation 7, its two terms on separate answers",
    needs=("reference",),
)
def apo_zero_unpaired(
    b: Rated, *, beta: Positive = 0.1, desirable_weight: NonNegative = 1.0, undesirable_weight: NonNegative = 1.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """``1 - σ(βD)`` for desirable answers, ``σ(βD)`` for undesirable, ``D = log π/π_ref``. Returns ``[B]``.

    KTO with the reference point fixed at 0: needs neither mismatched answers nor the whole step. For data whose desirable
    answers are better than what the model writes.
    """
    reward = beta * log_ratio(b)
    loss = torch.where(b.label, desirable_weight * torch.sigmoid(-reward), undesirable_weight * torch.sigmoid(reward))
    return loss, rated_metrics(reward, b.label)


apo_zero_unpaired.tags = ("data/feedback/point", "model/optimisation/likelihood")  # type: ignore[attr-defined]
