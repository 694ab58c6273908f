"""Unlikelihood training: every token of the rejected answer is made unlikely."""

from torch import Tensor

from metier.core.batch import Pairs
from metier.core.part import NonNegative, part
from metier.core.preferences import log1mexp, means, reward_metrics
from metier.parts.objective._statistics import pair_tokens, per_answer


@part("objective/unlikelihood", paper="arXiv:1908.04319, equation 5", needs=("tokens",))
def unlikelihood(b: Pairs, *, alpha: NonNegative = 1.0) -> tuple[Tensor, dict[str, Tensor]]:
    """``-a_w - α mean_t log(1 - p(y_l,t))``, ``a = log π(y)/|y|``, mean over the rejected answer's tokens. Returns ``[B]``.

    A rejected token is pushed by ``α p/(1 - p)`` over the answer's length: without bound as it becomes certain, up to
    ``p = 1 - 1e-6``, where the logarithm is held and the push ends. The paper applies it to repeated tokens of
    one text; for pairs the form is the card's. Metrics: rewards ``a``, and ``penalty``, the mean without α.
    """
    tokens, answers = pair_tokens(b), 2 * len(b.chosen_logps)
    chosen, rejected = means(b)
    # the chosen answers' tokens add nothing to the rejected ones' sums
    sums = per_answer(-log1mexp(tokens.logps), tokens.sequence, answers)[1::2]
    penalty = sums / b.rejected_len.clamp(min=1)
    return -chosen + alpha * penalty, {**reward_metrics(chosen, rejected), "penalty": penalty.detach()}


unlikelihood.tags = ("data/granularity/token",)  # type: ignore[attr-defined]
