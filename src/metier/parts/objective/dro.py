"""Direct reward optimization: a squared loss on scored answers, with the value of the prompt in closed form."""

from torch import Tensor

from metier.core.batch import Lists
from metier.core.part import Positive, part
from metier.core.preferences import average, list_metrics, log_ratio


@part(
    "objective/dro",
    paper="arXiv:2405.19107, V as the mean over the list",
    needs=("reference",),
)
def dro(b: Lists, *, tau: Positive = 1.0) -> tuple[Tensor, dict[str, Tensor]]:
    """``½ (r - V - τD)²``, mean over the answers of a list; ``D = log π/π_ref``. Returns ``[B]``.

    The paper fits a value network ``V(x)``, with each of policy and value held fixed in the other's gradient. Here ``V`` is
    the minimiser over the list, the mean of ``r - τD``. At the minimum the derivative with respect to ``V`` is zero, so
    holding ``V`` fixed or not gives the same gradient. Lists need at least two answers: one alone has loss 0.
    ``τ = 1`` is the paper's, as remembered.
    """
    ratio = log_ratio(b)
    residual = b.score - tau * ratio
    value = average(residual, b.present)
    loss = average(0.5 * (residual - value.unsqueeze(-1)).square(), b.present)
    return loss, {**list_metrics(tau * ratio, b), "value": value.detach()}


dro.tags = ("data/feedback/list",)  # type: ignore[attr-defined]
