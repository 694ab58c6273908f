"""SLiC-HF: a hinge on sequence likelihoods with a likelihood term."""

import torch
from torch import Tensor

from metier.core.batch import Pairs
from metier.core.part import NonNegative, part
from metier.core.preferences import reward_metrics


@part("objective/slic-hf", paper="arXiv:2305.10425, equation 1")
def slic_hf(b: Pairs, *, delta: NonNegative = 1.0, lam: NonNegative = 0.1) -> tuple[Tensor, dict[str, Tensor]]:
    """``max(0, δ - log π(y_w) + log π(y_l)) - λ log π(y_ref)``, sums over tokens. Returns ``[B]``.

    ``y_ref`` is the chosen answer, one of the paper's choices (the other is the fine-tuning target, which pairs do not
    hold). A pair whose margin has reached δ is left alone but for the likelihood term. Metrics: rewards ``log π``.
    """
    hinge = torch.relu(delta - b.chosen_logps + b.rejected_logps)
    metrics = {**reward_metrics(b.chosen_logps, b.rejected_logps), "active": (hinge > 0).to(hinge.dtype).detach()}
    return hinge - lam * b.chosen_logps, metrics


slic_hf.tags = ("constraint/reference/free", "model/optimisation/likelihood")  # type: ignore[attr-defined]
