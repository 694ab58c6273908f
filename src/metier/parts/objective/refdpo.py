"""Three rewards for the same logistic loss: with a reference, without, or with an unconditional prior."""

from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from metier.core.batch import Pairs
from metier.core.part import Positive, part
from metier.core.preferences import log_ratios, reward_metrics


@part("objective/refdpo", paper="arXiv:2407.13709, section 5", rows=(88,), needs=("reference",))
class RefDpo:
    """``-log σ(r_w - r_l)`` with a choice of the reward ``r``. Returns ``[B]``.

    ``ratio``: ``β log π(y|x)/π_ref(y|x)``, DPO. ``posterior``: ``β log π(y|x)``; no reference is needed, and β is one to
    three orders of magnitude larger. (The paper writes ``β p(y|x)``; its code is reference-free DPO, as here.) ``likelihood``:
    ``β[log π(y|x) - log p(y)]``, that is ``β log p(x|y)`` up to a constant: the same computation as ``ratio``, where the
    reference columns of the data hold log-probabilities of the bare answer, without the prompt, under the initial model.
    They have to be precomputed so: a live reference model makes it ``ratio``.

    β 0.01 to 0.02 was best for ``ratio`` there; answers degenerate when it is too small. Metrics: rewards.
    """

    tags = ("data/feedback/pair",)
    reads = Pairs

    def __init__(self, *, reward: Literal["ratio", "posterior", "likelihood"] = "ratio", beta: Positive = 0.01) -> None:
        self.reward = reward
        self.beta = beta
        self.needs = frozenset(() if reward == "posterior" else {"reference"})

    def __call__(self, b: Pairs) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses ``[B]`` and metrics."""
        raw = (b.chosen_logps, b.rejected_logps) if self.reward == "posterior" else log_ratios(b)
        chosen, rejected = (self.beta * r for r in raw)
        return -F.logsigmoid(chosen - rejected), reward_metrics(chosen, rejected)
