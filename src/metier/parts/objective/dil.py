"""DIL: imitation of the chosen answers by estimating a density ratio."""

from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from metier.core.batch import Pairs
from metier.core.part import Positive, part
from metier.core.preferences import log_ratios, reward_metrics

LARGEST = 20.0
"""Log-ratios are kept below this before they are exponentiated; below half of it before they are squared."""


@part("objective/dil", paper="arXiv:2503.05079", rows=(136,), needs=("reference",))
def dil(
    b: Pairs, *, f: Literal["lsif", "ukl", "bce"] = "lsif", average: bool = True, beta: Positive = 1.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Bregman fit of ``π/π_ref`` to the ratio of chosen to rejected answers, ``R = β log π/π_ref``. Returns ``[B]``.

    ``lsif``: ``-exp(R_w) + exp(2 R_l)/2``; ``ukl``: ``-R_w + exp(R_l)``; ``bce``: ``-log σ(R_w) - log σ(-R_l)``.
    At the reference: -1/2, 1, 2 log 2. (The authors' UKL leaves out ``log π_ref(y_w)``: the gradient is the same.)

    ``average``: R of token means, as the released code does, so that exponentials stay near 1; with sums ``lsif`` soon
    reaches the clamp, beyond which an exponential has no gradient. β = 1 there. Rejected answers stand in for samples of the
    reference: where they are better or worse than those, the estimate is biased. The chosen answer is always pushed
    up, whatever the rejected one. The ratio estimate by InfoNCE is DPO. Metrics: rewards R.
    """
    chosen, rejected = log_ratios(b)
    if average:
        chosen, rejected = chosen / b.chosen_len.clamp(min=1), rejected / b.rejected_len.clamp(min=1)
    chosen, rejected = beta * chosen, beta * rejected
    if f == "lsif":
        loss = 0.5 * (2 * rejected.clamp(max=LARGEST / 2)).exp() - chosen.clamp(max=LARGEST).exp()
    elif f == "ukl":
        loss = rejected.clamp(max=LARGEST).exp() - chosen
    else:
        loss = -F.logsigmoid(chosen) - F.logsigmoid(-rejected)
    return loss, reward_metrics(chosen, rejected)


dil.tags = ("constraint/divergence/generalisation", "model/optimisation/likelihood")  # type: ignore[attr-defined]
