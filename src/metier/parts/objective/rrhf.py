"""Rank responses to align with human feedback: a hinge on every misordered pair of token means, plus the best answer's NLL."""

from typing import Literal

from torch import Tensor

from metier.core.batch import Lists
from metier.core.part import NonNegative, part
from metier.core.preferences import average, best, better, list_metrics, mean


@part(
    "objective/rrhf",
    paper="arXiv:2304.05302",
)
def rrhf(b: Lists, *, sft_weight: NonNegative = 1.0, sft: Literal["sum", "mean"] = "sum") -> tuple[Tensor, dict[str, Tensor]]:
    """``Σ_{r_i < r_j} max(0, a_i - a_j) + w NLL(best)`` with ``a`` the mean log-probability per token. Returns ``[B]``.

    No reference, no margin: a pair in the right order has no loss. The negative log-likelihood of the best answer is a sum
    over tokens as in the paper, or a mean with ``sft="mean"``; tied best answers share it. Tied answers are no pair.
    The released code weighs the hinges 100 times a mean: ``sft="mean", sft_weight=0.01`` up to the scale.
    """
    scores = mean(b)
    excess = scores.unsqueeze(1) - scores.unsqueeze(2)  # [B, better, worse]: worse minus better
    hinge = excess.clamp(min=0).masked_fill(~better(b), 0.0).sum((1, 2))
    likelihood = average(b.logps if sft == "sum" else scores, best(b))
    return hinge - sft_weight * likelihood, list_metrics(scores, b)


rrhf.tags = ("data/feedback/list", "constraint/reference/free")  # type: ignore[attr-defined]
