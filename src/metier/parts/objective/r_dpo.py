"""Direct preference optimization with a length-regularized reward."""

from torch import Tensor
from torch.nn import functional as F

from metier.core.batch import Pairs
from metier.core.part import NonNegative, Positive, part
from metier.core.preferences import log_ratios, reward_metrics


@part("objective/r-dpo", paper="arXiv:2403.19159", needs=("reference",))
def r_dpo(b: Pairs, *, beta: Positive = 0.1, alpha: NonNegative = 0.01) -> tuple[Tensor, dict[str, Tensor]]:
    """``-log σ(β(Δ_w - Δ_l) + α(n_w - n_l))`` with ``Δ = log π/π_ref`` and n the answer's loss tokens. Returns ``[B]``.

    From the reward ``r - α|y|``: its optimum has ``r = β Δ + α|y|`` + const, so the sign is plus, and a preference for the
    longer answer is explained by its length with less push on the policy. Tables and code with a minus are around; that sign
    makes answers longer. ``alpha`` is in nats per token; 0 is ``objective/dpo``. Default as remembered.

    Metrics: rewards ``β Δ``, without the length term.
    """
    chosen, rejected = (beta * d for d in log_ratios(b))
    length = alpha * (b.chosen_len - b.rejected_len)
    return -F.logsigmoid(chosen - rejected + length), reward_metrics(chosen, rejected)


r_dpo.tags = ("model/generation/length",)  # type: ignore[attr-defined]
