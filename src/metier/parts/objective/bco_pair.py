"""Binary classification of the two answers of a pair."""

from torch import Tensor
from torch.nn import functional as F

from metier.core.batch import Pairs
from metier.core.part import Positive, part
from metier.core.preferences import log_ratios, reward_metrics


@part("objective/bco-pair", paper="arXiv:2404.04656, without reward shift", needs=("reference",))
def bco_pair(b: Pairs, *, beta: Positive = 0.01) -> tuple[Tensor, dict[str, Tensor]]:
    """``-log σ(R_w) - log σ(-R_l)`` with ``R = β log π/π_ref``. Returns ``[B]``.

    A classifier that calls chosen answers good and rejected answers bad, each for itself; twice the mean of the unpaired
    loss with reward shift 0. Not the same as ``objective/dpo``, of which it is an upper bound. Starts at ``2 log 2``.
    """
    chosen, rejected = (beta * d for d in log_ratios(b))
    return -F.logsigmoid(chosen) - F.logsigmoid(-rejected), reward_metrics(chosen, rejected)


bco_pair.tags = ("data/feedback/pair", "model/optimisation/likelihood")  # type: ignore[attr-defined]
