"""Kahneman–Tversky optimization: answers marked good or bad, no pairs."""

import torch
from torch import Tensor

from metier.core.batch import Rated
from metier.core.part import NonNegative, Positive, part
from metier.core.preferences import class_means, log_ratio, rated_metrics


@part(
    "objective/kto",
    paper="arXiv:2402.01306, equation 7",
    rows=(130,),
    needs=("reference", "mismatch", "batch"),
)
def kto(
    b: Rated, *, beta: Positive = 0.1, desirable_weight: NonNegative = 1.0, undesirable_weight: NonNegative = 1.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """``λ_D (1 - σ(β(D - z₀)))`` for desirable answers, ``λ_U (1 - σ(β(z₀ - D)))`` for undesirable. Returns ``[B]``.

    ``D = log π(y|x) - log π_ref(y|x)``. The reference point ``z₀ = max(0, mean D of mismatched answers)`` is taken over
    the whole step, over micro-batches and processes, and carries no gradient. The loss is bounded: answers that are already
    very right or very wrong move little. With imbalanced labels choose the weights so that
    ``λ_D n_D / (λ_U n_U)`` is between 1 and 4/3.

    Metrics: ``kl`` is ``z₀``; rewards ``βD``; accuracy compares ``D`` with ``z₀``.
    """
    assert b.other_logps is not None, "the objective declares needs=('mismatch',)"
    assert b.ref_other_logps is not None
    zero = (b.other_logps - b.ref_other_logps).mean().clamp(min=0).detach()
    ratio = log_ratio(b)
    loss = torch.where(
        b.label,
        desirable_weight * torch.sigmoid(-beta * (ratio - zero)),  # 1 - σ(x) as σ(-x), exact where σ(x) rounds to 1
        undesirable_weight * torch.sigmoid(-beta * (zero - ratio)),
    )
    accuracy = rated_metrics(ratio - zero, b.label)["accuracy"]
    return loss, {"reward": (beta * ratio).detach(), "accuracy": accuracy, **class_means(beta * ratio, b.label), "kl": zero}


kto.tags = ("data/feedback/point", "data/quality/noise")  # type: ignore[attr-defined]
