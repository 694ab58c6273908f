"""CPO: DPO with a uniform reference, and the likelihood of the chosen answer."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from metier.core.batch import Pairs
from metier.core.part import NonNegative, Positive, part
from metier.core.preferences import means, reward_metrics


@part("objective/cpo", paper="arXiv:2401.08417, equations 3 to 5")
def cpo(
    b: Pairs, *, beta: Positive = 0.1, c: NonNegative = 1.0, loss: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"
) -> tuple[Tensor, dict[str, Tensor]]:
    """``pair(log π(y_w) - log π(y_l)) - c a_w``, ``a_w = log π(y_w)/|y_w|``. Returns ``[B]``.

    ``pair(m)``: ``sigmoid`` ``-log σ(β m)``, ``hinge`` ``max(0, 1 - β m)`` on sums of log-probabilities; ``ipo``
    ``(m - 1/(2β))²`` on token means (β is IPO's τ), as in trl's CPO trainer. The likelihood term is a token mean, as in the
    authors' code (which takes one mean over all tokens of the batch); equation 5 of the paper has the sum.
    ``c`` = 0 leaves the pair term: with β = 1 that of ``typo``. Long answers make ``m`` large: see ``simpo`` for means.
    """
    chosen_mean, rejected_mean = means(b)
    if loss == "ipo":
        chosen, rejected = chosen_mean, rejected_mean
        pair = (chosen - rejected - 1 / (2 * beta)) ** 2
    else:
        chosen, rejected = b.chosen_logps, b.rejected_logps
        margin = beta * (chosen - rejected)
        pair = -F.logsigmoid(margin) if loss == "sigmoid" else torch.relu(1 - margin)
    metrics = {**reward_metrics(beta * chosen, beta * rejected), "nll": -chosen_mean.detach()}
    return pair - c * chosen_mean, metrics


cpo.tags = ("constraint/reference/free", "model/optimisation/likelihood")  # type: ignore[attr-defined]
