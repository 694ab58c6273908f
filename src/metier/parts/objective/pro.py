"""Preference ranking optimization: every answer against all worse ones, on token means."""

from typing import Literal

import torch
from torch import Tensor

from metier.core.batch import Lists
from metier.core.part import NonNegative, part
from metier.core.preferences import average, best, better, list_metrics, mean


@part(
    "objective/pro",
    paper="arXiv:2306.17492",
    rows=(124,),
)
def pro(
    b: Lists, *, temperatures: bool = True, sft_weight: NonNegative = 0.05, sft: Literal["sum", "mean"] = "sum"
) -> tuple[Tensor, dict[str, Tensor]]:
    """``Σ_k -log( e^{g_k a_k} / (e^{g_k a_k} + Σ_{i worse than k} e^{g_ki a_i}) ) + w NLL(best)``. Returns ``[B]``.

    ``a`` is the mean log-probability per token, no reference. ``g_ki = r_k - r_i`` is the reward gap (an inverse
    temperature) and ``g_k`` the largest of them; ``temperatures=False`` sets all to 1, the plain Plackett–Luce
    likelihood. ``w = sft_weight (n - 1)²`` with ``n`` answers in the list; the negative log-likelihood of the best answer is
    a sum over its tokens as in the released code, or a mean with ``sft="mean"``; tied best answers share it.
    The gaps scale the gradient: bring rewards to a known range first.

    Unlike the released code: tied answers are left out of each other's contrast (there each adds a constant 1), and the
    sum of exponentials neither overflows nor carries an epsilon.
    """
    scores, order = mean(b), better(b)
    gap = b.score.unsqueeze(2) - b.score.unsqueeze(1) if temperatures else torch.ones_like(order, dtype=scores.dtype)
    gap = gap.masked_fill(~order, 0.0)
    own = gap.amax(2) * scores
    others = (gap * scores.unsqueeze(1)).masked_fill(~order, -torch.inf)
    contrast = torch.cat([own.unsqueeze(2), others], dim=2).logsumexp(2) - own
    likelihood = average(b.logps if sft == "sum" else scores, best(b))
    weight = sft_weight * (b.present.sum(-1) - 1).clamp(min=0).square().to(scores.dtype)
    return contrast.masked_fill(~b.present, 0.0).sum(1) - weight * likelihood, list_metrics(scores, b)


pro.tags = ("data/feedback/list", "data/quality/gap")  # type: ignore[attr-defined]
