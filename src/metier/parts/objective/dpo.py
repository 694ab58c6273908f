"""Direct preference optimization."""

from torch import Tensor
from torch.nn import functional as F

from metier.core.batch import Pairs
from metier.core.part import Positive, part


@part(
    "objective/dpo",
    paper="arXiv:2305.18290, equation 7",
    needs=("reference",),
)
def dpo(b: Pairs, *, beta: Positive = 0.1) -> tuple[Tensor, dict[str, Tensor]]:
    """``-log σ(β[(log π(y_w) - log π_ref(y_w)) - (log π(y_l) - log π_ref(y_l))])``. Returns ``[B]``.

    Metrics: the implicit rewards ``β log π/π_ref`` of both answers, their margin, and how often it is positive.
    """
    assert b.ref_chosen_logps is not None
    assert b.ref_rejected_logps is not None
    chosen = beta * (b.chosen_logps - b.ref_chosen_logps)
    rejected = beta * (b.rejected_logps - b.ref_rejected_logps)
    margin = chosen - rejected
    metrics = {"chosen_reward": chosen, "rejected_reward": rejected, "margin": margin, "accuracy": (margin > 0).to(margin.dtype)}
    return -F.logsigmoid(margin), metrics
