"""TYPO: a preference likelihood without the reference, and an explicit divergence to it."""

from torch import Tensor
from torch.nn import functional as F

from metier.core.batch import Pairs
from metier.core.part import NonNegative, Positive, part
from metier.core.preferences import reward_metrics
from metier.parts.objective._statistics import sampled_mean


@part("objective/typo", paper="arXiv:2407.09072", rows=(86,), needs=("samples",))
class Typo:
    """``-log σ((log π(y_w) - log π(y_l))/τ) + λ KL(π_ref ‖ π)``. Returns ``[B]``.

    The divergence is estimated on answers ``y_s`` sampled from the reference at temperature 1 without truncation:
    ``mean_s [log π_ref(y_s) - log π(y_s)]``, unbiased. Without ``ref_sampled_logps`` the first term is left out: a
    constant, the gradient is the same. Forward KL: the reverse would need samples of the policy and break the
    interpolation between reference and data preference. Where the reference is already right the optimum stays there.

    Log-probabilities are sums; τ = 1 is the paper's. λ grows with the answers' length: 0.01 to 1. λ = 0 needs no samples and
    is ``cpo`` with β = 1/τ, c = 0. No code of the authors was found; the form is the card's, from abstract and memory.
    Metrics: rewards ``log π/τ``, and ``kl``, or ``cross_entropy`` where the constant is left out.
    """

    tags = ("constraint/divergence/diversity",)
    traits = {"divergence": ("forward-kl", "estimated on answers that the reference drew")}
    reads = Pairs

    def __init__(self, *, lam: NonNegative = 0.1, tau: Positive = 1.0) -> None:
        self.lam = lam
        self.tau = tau
        self.needs = frozenset({"samples"} if lam > 0 else ())

    def __call__(self, b: Pairs) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses ``[B]`` and metrics."""
        chosen, rejected = b.chosen_logps / self.tau, b.rejected_logps / self.tau
        loss, metrics = -F.logsigmoid(chosen - rejected), reward_metrics(chosen, rejected)
        if self.lam == 0:
            return loss, metrics
        cross_entropy = -sampled_mean(b.sampled_logps, b.sampled_len)
        if b.ref_sampled_logps is None:
            return loss + self.lam * cross_entropy, {**metrics, "cross_entropy": cross_entropy.detach()}
        kl = cross_entropy + sampled_mean(b.ref_sampled_logps, b.sampled_len)
        return loss + self.lam * kl, {**metrics, "kl": kl.detach()}
