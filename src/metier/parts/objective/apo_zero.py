"""Anchored preference optimization, for chosen answers that are better than the model's."""

import torch
from torch import Tensor

from metier.core.batch import Pairs
from metier.core.part import Positive, part
from metier.core.preferences import log_ratios, reward_metrics


@part("objective/apo-zero", paper="arXiv:2408.06266, equation 7", needs=("reference",))
def apo_zero(b: Pairs, *, beta: Positive = 0.1) -> tuple[Tensor, dict[str, Tensor]]:
    """``1 - σ(R_w) + σ(R_l)`` with ``R = β log π/π_ref``. Returns ``[B]``.

    Raises the chosen and lowers the rejected likelihood, each with gradient ``β σ(R)(1-σ(R))`` that fades as it moves away
    from the reference. Use it when the chosen answers are better than what the model says; ``objective/apo-down`` when
    even they are worse. Starts at 1.
    """
    chosen, rejected = (beta * d for d in log_ratios(b))
    return torch.sigmoid(-chosen) + torch.sigmoid(rejected), reward_metrics(chosen, rejected)


apo_zero.tags = ("model/optimisation/likelihood",)  # type: ignore[attr-defined]
