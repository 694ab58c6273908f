"""Binary classifier optimization: a logistic loss on single answers, with a running reward shift."""

from typing import Any, Literal

from torch import Tensor
from torch.nn import functional as F

from metier.core.batch import Rated
from metier.core.part import Positive, part
from metier.core.preferences import class_means, log_ratio, rated_metrics


@part(
    "objective/bco",
    paper="arXiv:2404.04656",
    needs=("reference", "batch"),
)
class BCO:
    """``-log σ(βD - δ)`` for desirable answers, ``-log σ(-(βD - δ))`` for undesirable, ``D = log π/π_ref``. Returns ``[B]``.

    ``δ`` is a running mean of the rewards ``βD`` without gradient, over every answer of every training step so far, the
    present one included (evaluation leaves it alone; 0 before the first step):

    - ``shift="balanced"``, the paper's: ``(E₊[βD] + E₋[βD]) / 2``, the two labels weigh the same however many answers
      each has; while one label has not been seen, the other's mean.
    - ``shift="pooled"``: the mean of all rewards, as trl's former BCO trainer does. The two agree when labels are balanced.

    The default β is the paper's (trl's former trainer has 0.1). Its weights for undesirable prompts that differ from the
    desirable ones (a classifier on prompt embeddings) are not part of this objective.
    """

    tags = ("data/feedback/point",)
    reads = Rated

    def __init__(self, *, beta: Positive = 0.01, shift: Literal["balanced", "pooled"] = "balanced") -> None:
        self.beta, self.pooled = beta, shift == "pooled"
        self._total = {True: 0.0, False: 0.0}
        self._count = {True: 0, False: 0}

    def __call__(self, b: Rated) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss ``[B]`` under the present shift, and metrics."""
        reward = self.beta * log_ratio(b)
        shifted = reward - self.delta
        loss = F.softplus((1 - 2 * b.label.to(reward.dtype)) * shifted)
        accuracy = rated_metrics(shifted, b.label)["accuracy"]
        metrics = {"reward": reward.detach(), "accuracy": accuracy, **class_means(reward, b.label)}
        return loss, {**metrics, "shift": reward.new_tensor(self.delta)}

    @property
    def delta(self) -> float:
        """The reward shift that the next loss is computed with."""
        if self.pooled:
            return sum(self._total.values()) / max(1, sum(self._count.values()))
        seen = [self._total[k] / n for k, n in self._count.items() if n]
        return sum(seen) / max(1, len(seen))

    def observe(self, b: Rated) -> None:
        """Take the rewards of a whole training step into the running means."""
        reward = self.beta * log_ratio(b).detach().double()
        for label in (True, False):
            mask = b.label if label else ~b.label
            self._total[label] += float(reward[mask].sum())
            self._count[label] += int(mask.sum())

    def state_dict(self) -> dict[str, Any]:
        """Sums and counts of rewards by label."""
        return {"total": [self._total[True], self._total[False]], "count": [self._count[True], self._count[False]]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict()``."""
        self._total = dict(zip((True, False), map(float, state["total"]), strict=True))
        self._count = dict(zip((True, False), map(int, state["count"]), strict=True))
