"""SimPO: token means as rewards, a target margin, no reference."""

from torch import Tensor
from torch.nn import functional as F

from metier.core.batch import Pairs
from metier.core.part import NonNegative, Positive, part
from metier.core.preferences import means, reward_metrics


@part("objective/simpo", paper="arXiv:2405.14734, equation 6")
def simpo(b: Pairs, *, beta: Positive = 2.0, gamma: NonNegative = 1.0) -> tuple[Tensor, dict[str, Tensor]]:
    """``-log σ(β(a_w - a_l) - γ)`` with ``a = log π(y)/|y|``. Returns ``[B]``.

    ``gamma`` is the target margin itself, in units of the reward ``β a``; the authors' code and configurations give the
    ratio γ/β (0.3 to 0.6, here 0.5), trl's ``simpo_gamma`` is this γ. β 2 to 10. At equal answers: ``log(1 + e^γ)``.
    No likelihood term: nothing keeps the chosen answer's likelihood up. For rewards that are sums instead of
    means see ``refdpo`` (``reward: posterior``) and ``cpo``.
    """
    chosen, rejected = (beta * a for a in means(b))
    return -F.logsigmoid(chosen - rejected - gamma), reward_metrics(chosen, rejected)


simpo.tags = ("constraint/reference/free", "model/generation/length")  # type: ignore[attr-defined]
