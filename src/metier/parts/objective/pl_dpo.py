"""Direct preference optimization on whole rankings (Plackett–Luce)."""

import torch
from torch import Tensor

from metier.core.batch import Lists
from metier.core.part import Positive, part
from metier.core.preferences import better, list_metrics, log_ratio


@part(
    "objective/pl-dpo",
    paper="arXiv:2305.18290, appendix A.3",
    needs=("reference",),
)
def pl_dpo(b: Lists, *, beta: Positive = 0.1) -> tuple[Tensor, dict[str, Tensor]]:
    """``Σ_k -log( e^{R_k} / (e^{R_k} + Σ_{i worse than k} e^{R_i}) )`` with ``R = β log π/π_ref``. Returns ``[B]``.

    Without ties this is the Plackett–Luce likelihood of the ranking by score; with two answers it is DPO. Tied answers are
    not set against each other: a list without any order has loss 0.
    """
    reward = beta * log_ratio(b)
    others = reward.unsqueeze(1).masked_fill(~better(b), -torch.inf)  # [B, k, i]
    contrast = torch.cat([reward.unsqueeze(2), others], dim=2).logsumexp(2) - reward
    return contrast.masked_fill(~b.present, 0.0).sum(1), list_metrics(reward, b)


pl_dpo.tags = ("data/feedback/list",)  # type: ignore[attr-defined]
