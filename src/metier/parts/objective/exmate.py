"""ExMATE: likelihood of the good answer, a bounded penalty on the bad one."""

from torch import Tensor

from metier.core.batch import Pairs
from metier.core.part import NonNegative, part
from metier.core.preferences import means, reward_metrics


@part("objective/exmate", paper="arXiv:2408.16751", rows=(98,))
def exmate(b: Pairs, *, lam: NonNegative = 0.05) -> tuple[Tensor, dict[str, Tensor]]:
    """``-a_w + λ exp(a_l)``, ``a = log π(y)/|y|``. Returns ``[B]``.

    The penalty stays within ``[0, λ]`` and fades as the bad answer becomes unlikely. Per pair; the code of the same group
    (CausalDialogue, ``mate_coef`` 0.05) exponentiates the mean over all tokens of a batch. The 2024 paper's text
    and code were not to hand: the form is the card's, as remembered and as in that code. λ = 0 is maximum likelihood; λ
    0.05 to 1. As an addition to another loss, e.g. DPO, see the combination of objectives. Metrics: rewards ``a``.
    """
    chosen, rejected = means(b)
    return -chosen + lam * rejected.exp(), reward_metrics(chosen, rejected)


exmate.tags = ("constraint/reference/free", "model/optimisation/likelihood")  # type: ignore[attr-defined]
