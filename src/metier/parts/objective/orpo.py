"""ORPO: likelihood of the chosen answer plus the log-odds ratio of both."""

from torch import Tensor
from torch.nn import functional as F

from metier.core.batch import Pairs
from metier.core.part import NonNegative, part
from metier.core.preferences import log_odds, means, reward_metrics


@part("objective/orpo", paper="arXiv:2403.07691, equations 6 and 7")
def orpo(b: Pairs, *, lam: NonNegative = 0.1) -> tuple[Tensor, dict[str, Tensor]]:
    """``-a_w - λ log σ(odds(a_w) - odds(a_l))``, ``odds(a) = a - log(1 - e^a)``, ``a = log π(y)/|y|``. Returns ``[B]``.

    The likelihood term is the token mean over the answer only. The authors' code (and trl's) takes by default the tokens
    of the prompt as well, and one mean over all tokens of the batch; ``disable_prompt_loss`` there is the form here. The
    odds are computed without cancellation, and ``a`` is kept below ``-1e-6`` (no gradient above it). λ 0.1 to 0.25.
    It trains from a base model: no reference, no earlier fine-tuning. Metrics: rewards ``λ a``, ``nll``, ``log_odds``.
    """
    chosen, rejected = means(b)
    ratio = log_odds(chosen) - log_odds(rejected)
    metrics = {**reward_metrics(lam * chosen, lam * rejected), "nll": -chosen.detach(), "log_odds": ratio.detach()}
    return -chosen - lam * F.logsigmoid(ratio), metrics


orpo.tags = ("constraint/reference/free",)  # type: ignore[attr-defined]
