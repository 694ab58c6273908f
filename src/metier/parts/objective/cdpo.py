"""Direct preference optimization for labels of which some are flipped, conservatively."""

from typing import Annotated

from annotated_types import Ge, Lt
from torch import Tensor
from torch.nn import functional as F

from metier.core.batch import Pairs
from metier.core.part import Positive, part
from metier.core.preferences import log_ratios, reward_metrics


@part(
    "objective/cdpo",
    paper="Mitchell 2023, A note on DPO with noisy preferences and relationship to IPO",
    rows=(78,),
    needs=("reference",),
)
def cdpo(
    b: Pairs, *, beta: Positive = 0.1, label_smoothing: Annotated[float, Ge(0), Lt(0.5)] = 0.1
) -> tuple[Tensor, dict[str, Tensor]]:
    """``-(1-ε) log σ(βh) - ε log σ(-βh)`` with ``h = Δ_w - Δ_l``, ``Δ = log π/π_ref``. Returns ``[B]``.

    ``label_smoothing`` ε is the share of flipped labels. The gradient in h is ``-β(σ(-βh) - ε)``: it changes its sign at
    ``βh = log((1-ε)/ε)``, so that over-confident pairs are pulled back. ε = 0 is ``objective/dpo``; the same as
    ``label-smoothing`` around ``dpo``. Starts at ``log 2``.
    """
    chosen, rejected = (beta * d for d in log_ratios(b))
    z = chosen - rejected
    loss = -(1 - label_smoothing) * F.logsigmoid(z) - label_smoothing * F.logsigmoid(-z)
    return loss, reward_metrics(chosen, rejected)


cdpo.tags = ("data/quality/noise",)  # type: ignore[attr-defined]
