"""Direct preference optimization."""

from torch import Tensor
from torch.nn import functional as F

from metier.core.batch import Pairs
from metier.core.part import Positive, part
from metier.core.preferences import log_ratios, reward_metrics


@part("objective/dpo", paper="arXiv:2305.18290, equation 7", rows=(78,), needs=("reference",))
def dpo(b: Pairs, *, beta: Positive = 0.1) -> tuple[Tensor, dict[str, Tensor]]:
    """``-log σ(β[(log π(y_w) - log π_ref(y_w)) - (log π(y_l) - log π_ref(y_l))])``. Returns ``[B]``.

    It starts at ``log 2``, with gradient ``-β/2`` on the chosen and ``+β/2`` on the rejected log-probability. No finite
    optimum: pairs that are always labelled alike are pushed apart without bound, and the chosen answer's likelihood may
    fall while the margin grows. With ``objective/ipo`` and ``objective/hinge`` one family, a convex function of the same
    margin; all three over-optimize, the sooner the smaller β (arXiv:2406.02900), so choose β and the stopping point by
    KL and held-out quality, not by this loss.

    Metrics: the implicit rewards ``β log π/π_ref`` of both answers, their margin, and how often it is positive.
    """
    chosen, rejected = (beta * d for d in log_ratios(b))
    return -F.logsigmoid(chosen - rejected), reward_metrics(chosen, rejected)


dpo.tags = ("data/feedback/pair",)  # type: ignore[attr-defined]
