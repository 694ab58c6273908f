"""AOT: the distribution of the policy's margins over that of the reference's."""

from typing import Annotated

import torch
from annotated_types import Ge, Lt
from torch import Tensor
from torch.nn import functional as F

from metier.core.batch import Pairs
from metier.core.part import Positive, part
from metier.core.preferences import log_ratios, reward_metrics


@part("objective/aot", paper="arXiv:2406.05882, equation 9", needs=("reference", "batch"))
def aot(
    b: Pairs, *, beta: Positive = 0.01, label_smoothing: Annotated[float, Ge(0), Lt(0.5)] = 0.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """``-(1-ε) log σ(z) - ε log σ(-z)``, ``z = β(u_(i) - v_(i))``, u and v sorted over the step. Returns ``[B]``.

    ``u = log π(y_w) - log π(y_l)``, v the same under the reference: the i-th smallest of one against the i-th smallest of
    the other (first-order stochastic dominance). A loss stands at the pair that its u belongs to. One pair is DPO.
    The step's pairs are sorted together, so the loss is the same however the step is split. Metrics: DPO's rewards.
    """
    chosen, rejected = log_ratios(b)
    assert b.ref_chosen_logps is not None
    assert b.ref_rejected_logps is not None
    margins, order = torch.sort(b.chosen_logps - b.rejected_logps, stable=True)
    target, _ = torch.sort(b.ref_chosen_logps - b.ref_rejected_logps)
    z = beta * (margins - target)
    sorted_loss = -(1 - label_smoothing) * F.logsigmoid(z) - label_smoothing * F.logsigmoid(-z)
    return sorted_loss[torch.argsort(order)], reward_metrics(beta * chosen, beta * rejected)


aot.tags = ("data/feedback/pair",)  # type: ignore[attr-defined]
