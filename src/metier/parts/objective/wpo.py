"""WPO: pairs weigh as much as the policy itself would be likely to write them."""

import torch
from torch import Tensor

from metier.core.batch import Pairs
from metier.core.config import PartRef
from metier.core.errors import UsageError
from metier.core.part import part
from metier.parts.objective._nested import Nested, Wrapper
from metier.parts.objective._statistics import pair_tokens, per_answer


@part("objective/wpo", paper="arXiv:2406.11827, equation 2", needs=("reference", "tokens", "collision"))
class Wpo(Wrapper):
    """``w · loss``, ``w = min(1, ω_w ω_l)`` without gradient, ``ω = exp(mean_t [log p_t - log Σ_v p_t(v)²])``. ``[B]``.

    ``of`` is any pair loss of single pairs (default ``dpo``). ω = 1 for tokens whose probability is the mean of those that
    the policy draws, ``Σ p²``; pairs that the policy would not write weigh less. ``clamp``: as in the authors' code; trl does
    not clamp. Losses that mix the pairs of a step (``needs`` batch) are refused: a weight per pair has no meaning there.
    Metrics: those of the loss, and ``weight``.
    """

    tags = ("model/generation/shift",)

    def __init__(self, *, of: PartRef = "dpo", clamp: bool = True) -> None:
        self._around(Nested("objective/wpo", of, (Pairs,)))
        if "batch" in self.needs:
            raise UsageError(f"wpo weighs single pairs, and {self.inner.id} mixes those of a step", where=self.inner.place)
        self.clamp = clamp
        self.needs = self.needs | {"tokens", "collision"}

    def __call__(self, b: Pairs) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses ``[B]`` and metrics."""
        loss, metrics = self.inner(b)
        weight = pair_weight(b)
        weight = weight.clamp(max=1) if self.clamp else weight
        return weight * loss, {**metrics, "weight": weight}


def pair_weight(b: Pairs) -> Tensor:
    """``ω_w ω_l`` ``[B]``, without gradient; at most the vocabulary's size squared."""
    tokens, answers = pair_tokens(b), 2 * len(b.chosen_logps)
    assert tokens.collision is not None, "the objective declares needs=('collision',)"
    aligned = (tokens.logps - tokens.collision).detach()
    count = per_answer(torch.ones_like(aligned), tokens.sequence, answers).clamp(min=1)
    mean = per_answer(aligned, tokens.sequence, answers) / count
    return (mean[0::2] + mean[1::2]).exp()
