"""XPO: DPO with a bonus for leaving the reference's answers."""

from torch import Tensor
from torch.nn import functional as F

from metier.core.batch import Pairs
from metier.core.part import NonNegative, Positive, part
from metier.core.preferences import log_ratios, reward_metrics
from metier.parts.objective._statistics import sampled_mean


@part("objective/xpo", paper="arXiv:2405.21046, algorithm 1", needs=("reference", "samples"))
def xpo(b: Pairs, *, beta: Positive = 0.1, alpha: NonNegative = 5e-6) -> tuple[Tensor, dict[str, Tensor]]:
    """DPO's loss ``+ α mean_s log π(y_s)``, ``y_s`` sampled from the reference. Returns ``[B]``.

    The plus sign lowers the likelihood of what the reference would say: optimistic exploration, small since α is. In the
    paper the pair is one answer of the policy and one of the reference, judged anew each round, and the sample is that
    of the reference; on pairs collected before it is DPO with a push away. Agrees with trl's XPO trainer.
    α = 0 is DPO, up to the samples it then does not use. Metrics: implicit rewards, and ``bonus``.
    """
    chosen, rejected = (beta * r for r in log_ratios(b))
    bonus = alpha * sampled_mean(b.sampled_logps, b.sampled_len)
    return -F.logsigmoid(chosen - rejected) + bonus, {**reward_metrics(chosen, rejected), "bonus": bonus.detach()}


xpo.tags = ("learning/paradigm/online",)  # type: ignore[attr-defined]
xpo.traits = {"loop": ("online", "its bonus is for exploring, one new pair at a time")}  # type: ignore[attr-defined]
