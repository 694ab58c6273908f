"""Efficient exact optimization over a list: reverse divergence from the scores' distribution."""

from torch import Tensor

from metier.core.batch import Lists
from metier.core.part import Positive, part
from metier.core.preferences import list_metrics, log_ratio, log_softmax


@part(
    "objective/exo-list",
    paper="arXiv:2402.00856, EXO-rw",
    needs=("reference",),
)
def exo_list(b: Lists, *, beta: Positive = 0.1, beta_r: Positive = 0.1) -> tuple[Tensor, dict[str, Tensor]]:
    """``KL( softmax(β log π/π_ref) ‖ softmax(score / β_r) )`` over the answers of a list. Returns ``[B]``.

    The policy's distribution comes first (mode seeking), unlike InfoNCA. Zero when rewards and ``score / β_r`` agree up to a
    constant; the gradient fades where the policy is confidently wrong. ``β_r`` follows the scale of the scores. The
    defaults are those of the authors' IMDb script; their others have 0.5 for both.
    """
    reward = beta * log_ratio(b)
    logp, logq = log_softmax(reward, b.present), log_softmax(b.score / beta_r, b.present)
    return (logp.exp() * (logp - logq)).sum(-1), list_metrics(reward, b)


exo_list.tags = ("data/feedback/list", "constraint/divergence/generalisation")  # type: ignore[attr-defined]
