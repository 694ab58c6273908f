"""Anchored preference optimization, for chosen answers that are worse than the model's."""

import torch
from torch import Tensor

from metier.core.batch import Pairs
from metier.core.part import Positive, part
from metier.core.preferences import log_ratios, reward_metrics


@part("objective/apo-down", paper="arXiv:2408.06266, equation 8", needs=("reference",))
def apo_down(b: Pairs, *, beta: Positive = 0.1) -> tuple[Tensor, dict[str, Tensor]]:
    """``σ(R_w) + 1 - σ(R_w - R_l)`` with ``R = β log π/π_ref``. Returns ``[B]``.

    At the start only the rejected answer is pushed down (gradient ``β/4``, none on the chosen one), then both, the rejected one
    more. Use it when even the chosen answers are worse than what the model says; else ``objective/apo-zero``. Starts at 1.
    """
    chosen, rejected = (beta * d for d in log_ratios(b))
    return torch.sigmoid(chosen) + torch.sigmoid(rejected - chosen), reward_metrics(chosen, rejected)


apo_down.tags = ("data/feedback/pair",)  # type: ignore[attr-defined]
