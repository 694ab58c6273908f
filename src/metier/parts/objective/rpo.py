"""Direct preference optimization with the likelihood of the chosen answer beside it."""

from torch import Tensor
from torch.nn import functional as F

from metier.core.batch import Pairs
from metier.core.part import NonNegative, Positive, part
from metier.core.preferences import log_ratios, means, reward_metrics


@part("objective/rpo", paper="arXiv:2404.19733 (iterative RPO); arXiv:2405.16436 (RPO)", needs=("reference",))
def rpo(b: Pairs, *, beta: Positive = 0.1, alpha: NonNegative = 1.0) -> tuple[Tensor, dict[str, Tensor]]:
    """``-log σ(β(Δ_w - Δ_l)) - α log π(y_w)/n_w`` with ``Δ = log π/π_ref``, n_w the answer's loss tokens. Returns ``[B]``.

    The second term keeps the chosen answer from losing likelihood. ``alpha`` 1 is iterative RPO, 0.2 the variant of RPO's
    appendix, 0 ``objective/dpo``. The same as ``combined`` of ``dpo`` and ``nll``. RPO itself adds ``η β`` times the *sum* of
    -log π(y_w), with η = 0.005: ``combined`` with ``nll: {reduction: sum}`` and the weight η β. Metrics: also the mean ``nll``
    per token.
    """
    chosen, rejected = (beta * d for d in log_ratios(b))
    nll = -means(b)[0]
    return -F.logsigmoid(chosen - rejected) + alpha * nll, {**reward_metrics(chosen, rejected), "nll": nll}


rpo.tags = ("model/optimisation/likelihood",)  # type: ignore[attr-defined]
