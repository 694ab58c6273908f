"""Identity preference optimization: a margin to reach and not to exceed."""

from torch import Tensor

from metier.core.batch import Pairs
from metier.core.part import Positive, part
from metier.core.preferences import log_ratios, reward_metrics


@part("objective/ipo", paper="arXiv:2310.12036, equation 17", rows=(78,), needs=("reference",))
def ipo(b: Pairs, *, tau: Positive = 0.1, average: bool = True) -> tuple[Tensor, dict[str, Tensor]]:
    """``(H - 1/(2τ))²`` with ``H = Δ_w/n_w - Δ_l/n_l`` (``average``) or ``Δ_w - Δ_l``, ``Δ = log π/π_ref``. Returns ``[B]``.

    The paper writes whole-answer log-ratios; its reported runs average over the answer's tokens, which is the default
    (trl does the same after asking the authors). τ of the two is not comparable. Unlike ``objective/dpo`` the optimum is
    finite even when labels are deterministic; for exact preference probabilities it is ``H = (P - 1/2)/τ``.
    Starts at ``1/(4τ²)``, which is 25 at the default: only its gradient ``2(H - 1/(2τ))`` matters.

    Metrics: rewards ``τ Δ`` (averaged when ``average``) of both answers, their margin, which is 1/2 at the optimum.
    """
    chosen, rejected = log_ratios(b)
    if average:
        chosen, rejected = chosen / b.chosen_len.clamp(min=1), rejected / b.rejected_len.clamp(min=1)
    return (chosen - rejected - 1 / (2 * tau)) ** 2, reward_metrics(tau * chosen, tau * rejected)


ipo.tags = ("constraint/divergence/generalisation",)  # type: ignore[attr-defined]
ipo.traits = {"model": ("preference", "its target is linear in the win probability, without Bradley-Terry")}  # type: ignore[attr-defined]
