"""Noise contrastive alignment over a list, the InfoNCE form."""

from torch import Tensor

from metier.core.batch import Lists
from metier.core.part import Positive, part
from metier.core.preferences import list_metrics, log_ratio, log_softmax, softmax


@part(
    "objective/infonca",
    paper="arXiv:2402.05369, InfoNCA",
    needs=("reference",),
)
def infonca(b: Lists, *, beta: Positive = 0.01, alpha: Positive = 0.001) -> tuple[Tensor, dict[str, Tensor]]:
    """``-Σ_k q_k log softmax(R)_k`` with ``R = β log π/π_ref`` and ``q = softmax(score / α)``. Returns ``[B]``.

    Learns from the sizes of the scores, not their order alone. ``α → 0`` trains the best answer against all others, which
    is DPO when there are two; tied answers share ``q``. Only differences of rewards count: all answers may become less
    likely (``nca-list`` prevents that).

    ``β`` is that of the released configuration, ``α`` the default of its trainer (the configuration: 1e-4): so small that the
    best answer is nearly alone in ``q``. An ``α`` of the size of the scores' spread uses their sizes. That trainer also adds
    0.01 to the first score of every list; this does not.
    """
    reward = beta * log_ratio(b)
    loss = -(softmax(b.score / alpha, b.present) * log_softmax(reward, b.present)).sum(-1)
    return loss, list_metrics(reward, b)


infonca.tags = ("data/feedback/list",)  # type: ignore[attr-defined]
