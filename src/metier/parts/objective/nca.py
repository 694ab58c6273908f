"""Noise contrastive alignment of a pair."""

from torch import Tensor
from torch.nn import functional as F

from metier.core.batch import Pairs
from metier.core.part import Positive, part
from metier.core.preferences import log_ratios, reward_metrics


@part("objective/nca", paper="arXiv:2402.05369 (NCA, two answers)", needs=("reference",))
def nca(b: Pairs, *, beta: Positive = 0.01) -> tuple[Tensor, dict[str, Tensor]]:
    """``-log σ(R_w) - ½ log σ(-R_w) - ½ log σ(-R_l)`` with ``R = β log π/π_ref``. Returns ``[B]``.

    The reward itself counts, not only the difference: that of the chosen answer has its optimum at ``log 2``, that of the
    rejected is pushed down with fading force. So the chosen likelihood does not fall with the rejected one.
    Gradients at the start: ``-β/4`` and ``+β/4``. Starts at ``2 log 2``.
    """
    chosen, rejected = (beta * d for d in log_ratios(b))
    loss = -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)
    return loss, reward_metrics(chosen, rejected)


nca.tags = ("data/feedback/pair", "model/optimisation/likelihood")  # type: ignore[attr-defined]
