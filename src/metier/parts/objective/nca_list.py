"""Noise contrastive alignment over a list, with absolute rewards."""

from torch import Tensor
from torch.nn import functional as F

from metier.core.batch import Lists
from metier.core.part import Positive, part
from metier.core.preferences import average, list_metrics, log_ratio, softmax


@part(
    "objective/nca-list",
    paper="arXiv:2402.05369, NCA",
    needs=("reference",),
)
def nca_list(b: Lists, *, beta: Positive = 0.01, alpha: Positive = 0.001) -> tuple[Tensor, dict[str, Tensor]]:
    """``-Σ_k [q_k log σ(R_k) + (1/K) log σ(-R_k)]``, ``R = β log π/π_ref``, ``q = softmax(score / α)``. Returns ``[B]``.

    ``K`` is the number of answers in the list. Each answer is told from noise on its own, so its likelihood, not only its
    advantage over the others, is optimized: ``R_k`` settles at ``log(K q_k)``. Defaults as for
    ``infonca``.
    """
    reward = beta * log_ratio(b)
    drawn = (softmax(b.score / alpha, b.present) * F.softplus(-reward)).sum(-1)
    return drawn + average(F.softplus(reward), b.present), list_metrics(reward, b)


nca_list.tags = ("data/feedback/list", "model/optimisation/likelihood")  # type: ignore[attr-defined]
