"""Direct preference optimization with calibrated rewards."""

from torch import Tensor
from torch.nn import functional as F

from metier.core.batch import Pairs
from metier.core.part import NonNegative, Positive, part
from metier.core.preferences import log_ratios, reward_metrics


@part("objective/cal-dpo", paper="arXiv:2412.14516", needs=("reference",))
def cal_dpo(b: Pairs, *, beta: Positive = 0.1, weight: NonNegative = 0.5) -> tuple[Tensor, dict[str, Tensor]]:
    """``-log σ(Δ_w - Δ_l) + c [(Δ_w - 1/(2β))² + (Δ_l + 1/(2β))²]`` with ``Δ = log π/π_ref``. Returns ``[B]``.

    The logistic term has no β of its own; β says where the log-ratios belong: rewards ``β Δ`` of +1/2 and -1/2. So the scale is
    fixed, the optimum finite, and the chosen likelihood cannot fall with the rejected one. c (``weight``) is 1/2, as in the
    first author's release (``tengxiao1/Cal-DPO``); another release and, as remembered, the paper have 1. β: 0.1 for a 2.8B
    model, 0.002 for a 7B model in these releases. Starts at ``log 2 + c/(2β²)``.
    """
    chosen, rejected = log_ratios(b)
    target = 1 / (2 * beta)
    calibration = (chosen - target) ** 2 + (rejected + target) ** 2
    loss = -F.logsigmoid(chosen - rejected) + weight * calibration
    return loss, reward_metrics(beta * chosen, beta * rejected)


cal_dpo.tags = ("model/optimisation/likelihood",)  # type: ignore[attr-defined]
