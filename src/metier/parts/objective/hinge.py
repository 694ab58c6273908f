"""Hinge loss on the margin of log-ratios."""

from torch import Tensor
from torch.nn import functional as F

from metier.core.batch import Pairs
from metier.core.part import Positive, part
from metier.core.preferences import log_ratios, reward_metrics


@part("objective/hinge", paper="arXiv:2309.06657 (RSO), hinge loss on normalized likelihoods", rows=(85,), needs=("reference",))
def hinge(b: Pairs, *, beta: Positive = 0.1) -> tuple[Tensor, dict[str, Tensor]]:
    """``max(0, 1 - β(Δ_w - Δ_l))`` with ``Δ = log π/π_ref``. Returns ``[B]``.

    SLiC with log-ratios to the reference in place of log-probabilities. Gradient ``∓β`` on the two log-probabilities until the
    margin reaches ``1/β`` nats, then none. Starts at 1.
    """
    chosen, rejected = (beta * d for d in log_ratios(b))
    return F.relu(1 - (chosen - rejected)), reward_metrics(chosen, rejected)


hinge.tags = ("constraint/divergence/generalisation",)  # type: ignore[attr-defined]
