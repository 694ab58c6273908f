"""β-DPO: β follows how far the pairs of a step are apart."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from metier.core.batch import Pairs
from metier.core.part import Beta, Fraction, Positive, part
from metier.core.preferences import log_ratios, reward_metrics
from metier.parts.objective._statistics import Running

SMALLEST_BETA = 1e-3


@part("objective/beta-dpo", paper="arXiv:2407.08639, equation 9", needs=("reference", "batch"))
class BetaDpo:
    """DPO with ``β = β₀[1 + a(M - M₀)]``, M the step's mean margin ``h`` and M₀ its running mean. Returns ``[B]``.

    ``h`` without β₀, and β without gradient and at least 1e-3, as in the authors' code. M₀ takes the step in before it is
    used. Pairs far apart (often easy or wrong) so get a larger β. ``keep`` < 1 leaves out the pairs whose h is farthest from M₀
    (at least one stays) and averages over the others; M is then their mean. The authors draw the kept 80 % at random, by
    Gaussian weights in the same distance; here the nearest are taken, so that the loss depends on the data only.

    ``bias_correction`` divides M₀ by the weight of the steps so far; without, as released, it starts at 0.
    ``a`` 0.4 to 0.6. A step of one pair does not move M₀. Metrics: rewards ``β₀ log π/π_ref``, ``beta``.
    """

    tags = ("data/quality/gap",)
    reads = Pairs

    def __init__(
        self, *, beta: Positive = 0.1, a: float = 0.6, momentum: Beta = 0.9, keep: Fraction = 1.0, bias_correction: bool = True
    ) -> None:
        self.beta = beta
        self.a = a
        self.keep = keep
        self.running = Running(momentum, bias_correction)

    def __call__(self, b: Pairs) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses ``[B]`` and metrics; reads M₀."""
        chosen, rejected = log_ratios(b)
        gap = chosen - rejected
        kept = self._kept(gap.detach())
        mean = (gap.detach() * kept).mean() if len(gap) else gap.sum()
        start = self.running.mean if self.running.count else mean
        beta = (self.beta * (1 + self.a * (mean - start))).clamp(min=SMALLEST_BETA)
        metrics = {**reward_metrics(self.beta * chosen, self.beta * rejected), "beta": beta.expand(len(gap))}
        return -F.logsigmoid(beta * gap) * kept, metrics

    def _kept(self, gap: Tensor) -> Tensor:
        """``B/kept`` for pairs that stay, 0 for those left out, so that the mean over all is the mean over the kept."""
        count = max(1, math.floor(self.keep * len(gap) + 1e-9))
        if count >= len(gap):
            return torch.ones_like(gap)
        nearest = torch.argsort((gap - self.running.mean).abs(), stable=True)[:count]
        return torch.zeros_like(gap).index_fill(0, nearest, len(gap) / count)

    def observe(self, b: Pairs) -> None:
        """Take the step's margins into M₀."""
        chosen, rejected = log_ratios(b)
        self.running.update(chosen - rejected)

    def state_dict(self) -> dict[str, float]:
        """M₀ as sums."""
        return self.running.state_dict()

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Take up M₀."""
        self.running.load_state_dict(state)
