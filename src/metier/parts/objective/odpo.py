"""Direct preference optimization with an offset: how much better, not only which."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from metier.core.batch import Pairs
from metier.core.errors import UsageError
from metier.core.part import NonNegative, Positive, part
from metier.core.preferences import log_ratios, reward_metrics


@part("objective/odpo", paper="arXiv:2402.10571", needs=("reference",))
def odpo(
    b: Pairs, *, beta: Positive = 0.1, alpha: NonNegative = 1.0, offset: Literal["log", "linear"] = "log"
) -> tuple[Tensor, dict[str, Tensor]]:
    """``-log σ(β(Δ_w - Δ_l) - α f(s_w - s_l))`` with ``Δ = log π/π_ref``, s the given scores, f log or linear. Returns ``[B]``.

    The margin that a pair must reach grows with the gap of its scores. ``log`` is the paper's choice: gaps below 1 then
    *lower* the demand, so the scale of the scores matters. ``alpha`` 0 is ``objective/dpo``; ``linear`` is ``with-margin``
    around ``dpo`` with ``scale = alpha/beta``. As in the authors' code, where α is 1 too. Metrics: rewards ``β Δ``, ``offset``.

    Raises ``UsageError`` when the data have no scores, and when the scores of some pairs contradict their order (or tie, for
    ``log``): any number put in their place would be a guess, and log 0 would demand nothing of them.
    """
    chosen, rejected = (beta * d for d in log_ratios(b))
    gap = _gap(b, strict=offset == "log")
    demand = alpha * (torch.log(gap) if offset == "log" else gap)
    return -F.logsigmoid(chosen - rejected - demand), {**reward_metrics(chosen, rejected), "offset": demand}


odpo.tags = ("data/quality/gap",)  # type: ignore[attr-defined]


def _gap(b: Pairs, strict: bool) -> Tensor:
    if b.margin is None:
        raise UsageError(
            "objective/odpo needs the scores of both answers, and these data have none",
            hint="Give each pair `margin`, or `score_chosen` and `score_rejected`; without scores use objective: dpo.",
        )
    bad = int((~(b.margin > 0 if strict else b.margin >= 0)).sum())
    if bad:
        wanted = "above" if strict else "at least as high as"
        raise UsageError(
            f"objective/odpo: in {bad} of {len(b.margin)} pairs the chosen answer's score is not {wanted} the rejected one's",
            hint="Drop or exchange such pairs; `offset: linear` accepts ties, and objective: with-margin any gap.",
        )
    return b.margin
