"""α-DPO: SimPO with a margin that follows how far policy and reference differ on the pair."""

from torch import Tensor
from torch.nn import functional as F

from metier.core.batch import Pairs
from metier.core.part import Beta, NonNegative, Positive, part
from metier.core.preferences import log_ratios, means, reward_metrics
from metier.parts.objective._statistics import Running


@part("objective/alpha-dpo", paper="arXiv:2410.10148, equation 12", needs=("reference", "batch"))
class AlphaDpo:
    """``-log σ(β[(a_w - a_l) - (γ + α M)])``, ``a`` token means, M without gradient. Returns ``[B]``.

    M is the z-score of the mean log-ratio gap ``(a_w - a_l) - (a_w - a_l under π_ref)`` by running mean and standard
    deviation (n - 1) over the steps, which take the step in before they are used; kept within ±clip. ``gamma_ratio`` is γ in
    units of ``a``: α = 0 is ``simpo`` with its γ = β·gamma_ratio, and so is a part that has not seen a step yet.

    ``bias_correction``: the moments start at 0 in the authors' code, which makes the first steps' standard deviation tiny
    and M large (it is not clipped there); here they are divided by the weight of the steps so far. A step of one pair
    moves neither. The defaults are the released configuration for Llama 3, one of four: β 2.5 or 10, ratio
    0.15 to 0.6, α 0.05 or 0.2. Metrics: rewards ``β a``, ``z``.
    """

    tags = ("data/quality/gap", "model/generation/length")
    reads = Pairs

    def __init__(
        self, *, beta: Positive = 2.5, gamma_ratio: NonNegative = 0.6, alpha: float = 0.2, momentum: Beta = 0.9,
        bias_correction: bool = True, clip: Positive = 3.0,
    ) -> None:  # fmt: skip
        self.beta = beta
        self.gamma_ratio = gamma_ratio
        self.alpha = alpha
        self.clip = clip
        self.running = Running(momentum, bias_correction)

    def __call__(self, b: Pairs) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses ``[B]`` and metrics; reads the moments."""
        chosen, rejected = means(b)
        z = self._z(gap(b))
        loss = -F.logsigmoid(self.beta * (chosen - rejected - (self.gamma_ratio + self.alpha * z)))
        return loss, {**reward_metrics(self.beta * chosen, self.beta * rejected), "z": z}

    def _z(self, values: Tensor) -> Tensor:
        # equal gaps, as before training, have no spread to measure by
        if self.running.std < 1e-8:
            return values * 0
        return ((values - self.running.mean) / self.running.std).clamp(-self.clip, self.clip)

    def observe(self, b: Pairs) -> None:
        """Take the step's gaps into the moments."""
        self.running.update(gap(b))

    def state_dict(self) -> dict[str, float]:
        """The moments as sums."""
        return self.running.state_dict()

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Take up the moments."""
        self.running.load_state_dict(state)


def gap(b: Pairs) -> Tensor:
    """``[B]`` difference of the answers' mean log-ratios, without gradient."""
    chosen, rejected = log_ratios(b)
    return (chosen / b.chosen_len.clamp(min=1) - rejected / b.rejected_len.clamp(min=1)).detach()
