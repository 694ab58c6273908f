"""The reward model's loss: a logistic regression on differences of scores (Bradley and Terry, 1952)."""

from torch import Tensor
from torch.nn import functional as F

from metier.core.batch import Rewards
from metier.core.errors import UsageError
from metier.core.part import NonNegative, part
from metier.core.preferences import reward_metrics


@part("objective/bradley-terry", paper="arXiv:2203.02155 (InstructGPT), equation 1; margin: arXiv:2307.09288, equation 2")
def bradley_terry(
    b: Rewards, *, margin_scale: NonNegative = 0.0, centering: NonNegative = 0.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """``-log σ(r_w - r_l - margin_scale · (s_w - s_l)) + centering · (r_w + r_l)²`` with given scores s. Returns ``[B]``.

    Trains a reward model: the model gets a head with one output, read at the last token of each answer, and is loaded and
    saved as a ``…ForSequenceClassification``. With an adapter the head, which is new, trains and is saved beside it.
    Slope ``-σ(r_l - r_w + …)`` in ``r_w`` and its negative in ``r_l``: 1/2 at a tie, so a head of zeros starts at ``log 2``.

    Pairs determine rewards up to a constant of the prompt; ``centering`` (0.01 is usual) holds the mean near 0, without
    which it drifts. ``margin_scale`` asks for more where the given scores differ more; it is 0 by default, since scores come
    on any scale (``trl`` 1.16 uses a ``margin`` column whenever there is one, at scale 1; otherwise this is its loss).

    Metrics: both rewards, their margin, how often it is positive. Raises ``UsageError`` for a margin that the data lack.
    """
    gap = b.chosen - b.rejected
    if margin_scale > 0:
        if b.margin is None:
            raise UsageError(
                "objective/bradley-terry: margin_scale needs the scores of both answers, and these data have none",
                hint="Give each pair `margin`, or `score_chosen` and `score_rejected`; or leave margin_scale at 0.",
            )
        gap = gap - margin_scale * b.margin
    loss = -F.logsigmoid(gap)
    if centering > 0:
        loss = loss + centering * (b.chosen + b.rejected) ** 2
    return loss, reward_metrics(b.chosen, b.rejected)


bradley_terry.tags = ("data/feedback/pair",)  # type: ignore[attr-defined]
