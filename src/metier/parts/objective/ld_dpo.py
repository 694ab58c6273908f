"""LD-DPO: what the longer answer says beyond the shorter one's length counts less."""

import torch
from torch import Tensor
from torch.nn import functional as F

from metier.core.batch import Pairs
from metier.core.part import Fraction, Positive, part
from metier.core.preferences import reward_metrics
from metier.parts.objective._statistics import pair_tokens, per_answer, place


@part("objective/ld-dpo", paper="arXiv:2409.06411, equation 8", needs=("reference", "tokens"))
def ld_dpo(b: Pairs, *, beta: Positive = 0.1, alpha: Fraction = 0.5) -> tuple[Tensor, dict[str, Tensor]]:
    """DPO with ``log π = Σ_{t≤k} log p_t + α Σ_{t>k} log p_t``, ``k`` the shorter answer's length. Returns ``[B]``.

    Policy and reference alike. α = 1 is DPO; α = 0 compares the first k tokens of both. Agrees with trl's ``ld_alpha``.
    Metrics: rewards ``β log π/π_ref`` of the sums so weighted.
    """
    tokens, answers = pair_tokens(b), 2 * len(b.chosen_logps)
    assert tokens.ref_logps is not None, "the objective declares needs=('reference',)"
    lengths = torch.bincount(tokens.sequence.long(), minlength=answers)
    shorter = torch.minimum(lengths[0::2], lengths[1::2])
    tail = place(tokens.sequence) >= shorter[tokens.sequence.long() // 2]
    ratio = tokens.logps - tokens.ref_logps
    sums = beta * per_answer(torch.where(tail, alpha * ratio, ratio), tokens.sequence, answers)
    chosen, rejected = sums[0::2], sums[1::2]
    return -F.logsigmoid(chosen - rejected), reward_metrics(chosen, rejected)


ld_dpo.tags = ("model/generation/length",)  # type: ignore[attr-defined]
