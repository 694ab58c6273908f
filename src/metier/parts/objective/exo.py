"""Exact optimization: the reverse divergence of the two-way policy to the label."""

import math
from typing import Annotated

import torch
from annotated_types import Gt, Lt
from torch import Tensor
from torch.nn import functional as F

from metier.core.batch import Pairs
from metier.core.part import Positive, part
from metier.core.preferences import log_ratios, reward_metrics


@part("objective/exo", paper="arXiv:2402.00856, equation 16", needs=("reference",))
def exo(
    b: Pairs, *, beta: Positive = 0.1, label_smoothing: Annotated[float, Gt(0), Lt(0.5)] = 1e-3
) -> tuple[Tensor, dict[str, Tensor]]:
    """``q [log q - log(1-ε)] + (1-q) [log(1-q) - log ε]`` with ``q = σ(β(Δ_w - Δ_l))``, ``Δ = log π/π_ref``. Returns ``[B]``.

    ``KL(q ‖ (1-ε, ε))``, mode-seeking where ``objective/dpo`` is mean-seeking; ε (``label_smoothing``) must be above 0. The
    gradient in z = β(Δ_w - Δ_l) is ``q(1-q)[z - log((1-ε)/ε)]``: finite optimum, and no pull on pairs that are very
    wrong. Starts at ``-log 2 - log(ε(1-ε))/2``, 2.7612 at the default.
    """
    chosen, rejected = (beta * d for d in log_ratios(b))
    z = chosen - rejected
    win = torch.sigmoid(z) * (F.logsigmoid(z) - math.log1p(-label_smoothing))
    lose = torch.sigmoid(-z) * (F.logsigmoid(-z) - math.log(label_smoothing))
    return win + lose, reward_metrics(chosen, rejected)


exo.tags = ("constraint/divergence/generalisation",)  # type: ignore[attr-defined]
