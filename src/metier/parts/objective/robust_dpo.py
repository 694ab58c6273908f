"""Direct preference optimization that is unbiased under flipped labels."""

from typing import Annotated

from annotated_types import Ge, Lt
from torch import Tensor
from torch.nn import functional as F

from metier.core.batch import Pairs
from metier.core.part import Positive, part
from metier.core.preferences import log_ratios, reward_metrics


@part("objective/robust-dpo", paper="arXiv:2403.00409 (robust DPO)", needs=("reference",))
def robust_dpo(
    b: Pairs, *, beta: Positive = 0.1, label_smoothing: Annotated[float, Ge(0), Lt(0.5)] = 0.1
) -> tuple[Tensor, dict[str, Tensor]]:
    """``[-(1-ε) log σ(βh) + ε log σ(-βh)] / (1 - 2ε)`` with ``h = Δ_w - Δ_l``, ``Δ = log π/π_ref``. Returns ``[B]``.

    When a share ε (``label_smoothing``) of labels is flipped, its expectation is the loss of ``objective/dpo`` on the clean
    labels. The gradient in h, ``-β[(1-ε) σ(-βh) + ε σ(βh)] / (1-2ε)``, never vanishes and the loss has no lower bound
    (it falls like ``-εβh/(1-2ε)``): stop early. ε = 0 is ``objective/dpo``. Starts at ``log 2``.
    """
    chosen, rejected = (beta * d for d in log_ratios(b))
    z = chosen - rejected
    loss = (-(1 - label_smoothing) * F.logsigmoid(z) + label_smoothing * F.logsigmoid(-z)) / (1 - 2 * label_smoothing)
    return loss, reward_metrics(chosen, rejected)


robust_dpo.tags = ("data/quality/noise",)  # type: ignore[attr-defined]
