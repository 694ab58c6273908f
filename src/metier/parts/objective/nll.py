"""Likelihood of the chosen answer: supervised fine-tuning on the better half of pairs."""

from typing import Literal

from torch import Tensor

from metier.core.batch import Pairs
from metier.core.part import part
from metier.core.preferences import means, reward_metrics


@part("objective/nll", paper="maximum likelihood of the chosen answer")
def nll(b: Pairs, *, reduction: Literal["mean", "sum"] = "mean") -> tuple[Tensor, dict[str, Tensor]]:
    """``-log π(y_w)``, divided by the answer's loss tokens with ``mean``. Returns ``[B]``; the rejected answer has no gradient.

    The control arm of preference losses, and inside ``combined`` their regularizer: ``{losses: [dpo, nll]}``. With ``mean``
    every answer weighs the same, with ``sum`` every token (up to a factor). trl's ``sft`` is the mean over the tokens of
    the batch: the same when lengths are equal. Metrics: log-probabilities of both answers, reduced alike, as rewards.
    """
    chosen, rejected = means(b) if reduction == "mean" else (b.chosen_logps, b.rejected_logps)
    return -chosen, reward_metrics(chosen, rejected)


nll.tags = ("data/feedback/pair",)  # type: ignore[attr-defined]
