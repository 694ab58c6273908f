"""Direct preference optimization under other divergences to the reference."""

import math
from typing import Annotated, Literal

import torch
from annotated_types import Gt, Le
from torch import Tensor
from torch.nn import functional as F

from metier.core.batch import Pairs
from metier.core.part import Positive, part
from metier.core.preferences import log_ratios, reward_metrics

LARGEST = 80.0
"""``exp`` of more is not a float32."""


@part("objective/f-dpo", paper="arXiv:2309.16240, theorem 1 and table 1", needs=("reference",))
def f_dpo(
    b: Pairs,
    *,
    beta: Positive = 0.1,
    divergence: Literal["reverse-kl", "forward-kl", "js", "alpha"] = "js",
    alpha: Annotated[float, Gt(0), Le(1)] = 0.5,
) -> tuple[Tensor, dict[str, Tensor]]:
    """``-log σ(β[F(u_w) - F(u_l)])`` with ``u = π/π_ref`` and F the derivative of the divergence's f. Returns ``[B]``.

    ========== =========================== ==================================================================
    reverse-kl ``log u``                   is ``objective/dpo``
    forward-kl ``1 - 1/u``                 covers the reference; answers it loses weigh exponentially
    js         ``log(2u/(1+u))``           Jensen–Shannon: what a right pair gains is bounded by log 2
    alpha      ``(1 - u^-α)/α``            between: ``log u`` for α → 0, forward KL at α = 1
    ========== =========================== ==================================================================

    ``alpha`` is read by ``divergence: alpha`` only; 1 - alpha is what trl calls ``f_alpha_divergence_coef``. u is of whole
    answers, so exponents of long ones are large: they are kept below 80, beyond which there is no gradient.
    Rewards in the metrics are ``β F(u)``. Starts at ``log 2`` with the gradient of ``objective/dpo`` (for js half of it).
    """
    chosen, rejected = (beta * _slope(d, divergence, alpha) for d in log_ratios(b))
    return -F.logsigmoid(chosen - rejected), reward_metrics(chosen, rejected)


f_dpo.tags = ("constraint/divergence/diversity",)  # type: ignore[attr-defined]
f_dpo.traits = {"divergence": ("js", "the default; an option")}  # type: ignore[attr-defined]


def _slope(log_u: Tensor, divergence: str, alpha: float) -> Tensor:
    """``f'(u)``, up to a constant that cancels between the two answers."""
    if divergence == "reverse-kl":
        return log_u
    if divergence == "js":
        return math.log(2) + F.logsigmoid(log_u)
    power = 1.0 if divergence == "forward-kl" else alpha
    return -torch.expm1((-power * log_u).clamp(max=LARGEST)) / power
