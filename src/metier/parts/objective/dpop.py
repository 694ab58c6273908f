"""Direct preference optimization that does not let the chosen answer fall."""

from torch import Tensor
from torch.nn import functional as F

from metier.core.batch import Pairs
from metier.core.part import NonNegative, Positive, part
from metier.core.preferences import log_ratios, reward_metrics


@part("objective/dpop", paper="arXiv:2402.13228 (DPO-Positive, Smaug)", needs=("reference",))
def dpop(b: Pairs, *, beta: Positive = 0.3, lam: NonNegative = 50.0) -> tuple[Tensor, dict[str, Tensor]]:
    """``-log σ(β[Δ_w - Δ_l - λ max(0, -Δ_w)])`` with ``Δ = log π/π_ref``. Returns ``[B]``.

    While the chosen answer is less likely than under the reference, its gradient is ``1 + λ`` times as large; above, the loss
    is ``objective/dpo``, as it is with ``lam`` 0. Meant for pairs that differ in a few tokens. Defaults as remembered from
    the paper. Starts at ``log 2`` with dpo's gradient.
    """
    chosen, rejected = (beta * d for d in log_ratios(b))
    return -F.logsigmoid(chosen - rejected - lam * F.relu(-chosen)), reward_metrics(chosen, rejected)


dpop.tags = ("model/optimisation/likelihood",)  # type: ignore[attr-defined]
