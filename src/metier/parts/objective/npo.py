"""Negative preference optimization: unlearn bad answers."""

import torch
from torch import Tensor
from torch.nn import functional as F

from metier.core.batch import Rated
from metier.core.part import NonNegative, Positive, part
from metier.core.preferences import log_ratio, mean, rated_metrics


@part(
    "objective/npo",
    paper="arXiv:2404.05868",
    needs=("reference",),
)
def npo(b: Rated, *, beta: Positive = 0.1, retain_weight: NonNegative = 0.0) -> tuple[Tensor, dict[str, Tensor]]:
    """``(2/β) log(1 + (π/π_ref)^β)`` on undesirable answers. Returns ``[B]``.

    The gradient is that of ascent on the negative log-likelihood times ``2σ(βD)``: 1 at the start, fading as the answer
    becomes unlikely; ``β → 0`` is plain gradient ascent. Desirable answers are the data to keep: they add
    ``retain_weight`` times their mean negative log-likelihood per token (the paper's retain loss), by default nothing. The
    forgetting term is that of the authors' code.
    """
    ratio = log_ratio(b)
    forget = (2 / beta) * F.softplus(beta * ratio)
    return torch.where(b.label, -retain_weight * mean(b), forget), rated_metrics(beta * ratio, b.label)


npo.tags = ("data/feedback/point",)  # type: ignore[attr-defined]
