"""Dr. DPO: distributionally robust over the pairs of a batch."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from metier.core.batch import Pairs
from metier.core.part import Positive, part
from metier.core.preferences import log_ratios, reward_metrics


@part("objective/dr-dpo", paper="arXiv:2407.07880, equation 12", needs=("reference", "batch"))
def dr_dpo(b: Pairs, *, beta: Positive = 0.1, beta_prime: Positive = 1.0) -> tuple[Tensor, dict[str, Tensor]]:
    """``-β' log mean_i exp(log σ(β h_i)/β')`` over the pairs of the step, ``h`` DPO's margin. Returns it ``B`` times.

    Pair i has gradient weight ``softmax_i(log σ(β h)/β')``: pairs that the policy finds implausible, and that may be
    mislabelled, weigh less; the smaller β', the less. β' → ∞ is DPO's mean, one pair alone is DPO. The form of the
    authors' code, β' its ``mode_weight``. Metrics: implicit rewards, and ``weight`` (mean 1).
    """
    chosen, rejected = (beta * r for r in log_ratios(b))
    plausible = F.logsigmoid(chosen - rejected) / beta_prime
    count = len(plausible)
    loss = -beta_prime * (torch.logsumexp(plausible, 0) - math.log(max(1, count)))
    metrics = {**reward_metrics(chosen, rejected), "weight": count * plausible.detach().softmax(0)}
    return loss.expand(count), metrics


dr_dpo.tags = ("data/quality/noise",)  # type: ignore[attr-defined]
