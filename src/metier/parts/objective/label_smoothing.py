"""Label smoothing of any pairwise objective."""

from dataclasses import replace
from typing import Annotated

import torch
from annotated_types import Ge, Lt
from torch import Tensor

from metier.core.batch import Pairs, Tokens
from metier.core.config import PartRef
from metier.core.errors import UsageError
from metier.core.part import part
from metier.parts.objective._nested import Nested, Wrapper

ID = "objective/label-smoothing"


@part(
    "objective/label-smoothing",
    paper="Mitchell 2023, A note on DPO with noisy preferences; arXiv:2403.00409 for `unbiased`",
    rows=(78,),
)
class LabelSmoothing(Wrapper):
    """``(1-ε) L(y_w, y_l) + ε L(y_l, y_w)`` of the pairwise objective ``of``; ``[B]``.

    ``rate`` ε is the share of labels thought to be flipped. With ``unbiased`` it is
    ``[(1-ε) L(y_w, y_l) - ε L(y_l, y_w)] / (1-2ε)`` instead: over flips with rate ε its expectation is the loss on clean labels,
    at the price of having no lower bound. Around ``dpo`` these are ``cdpo`` and ``robust-dpo``. A margin that the loss asks for
    itself (γ of ``simpo``) is asked of the exchanged answers too; trl turns the sign of the whole argument, γ included.
    Exchanged answers have the opposite score margin, so ``odpo``, whose gap must be positive, is refused.

    Meant for losses of single pairs, as the expectation is. One that mixes the pairs of a step sees all labels exchanged at
    once, and running means stay those of the labels as given, by which exchanged pairs look unlike all others (``alpha-dpo``,
    ``beta-dpo``, ``spa``). Metrics are those of the labels as given.
    """

    tags = ("data/quality/noise",)
    example = {"of": "dpo"}

    def __init__(self, *, of: PartRef, rate: Annotated[float, Ge(0), Lt(0.5)] = 0.1, unbiased: bool = False) -> None:
        self._around(Nested(ID, of, (Pairs,)))
        self.rate, self.unbiased = rate, unbiased

    def __call__(self, b: Pairs) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss ``[B]`` and the inner objective's metrics."""
        loss, metrics = self.inner(b)
        if self.rate == 0:
            return loss, metrics
        try:
            flipped, _ = self.inner(exchanged(b))
        except UsageError as e:
            raise UsageError(f"with the two answers exchanged: {e.what}", where=self.inner.place) from None
        if self.unbiased:
            return ((1 - self.rate) * loss - self.rate * flipped) / (1 - 2 * self.rate), metrics
        return (1 - self.rate) * loss + self.rate * flipped, metrics


def exchanged(b: Pairs) -> Pairs:
    """The same pairs with the opposite labels."""
    return replace(
        b,
        chosen_logps=b.rejected_logps,
        rejected_logps=b.chosen_logps,
        chosen_len=b.rejected_len,
        rejected_len=b.chosen_len,
        ref_chosen_logps=b.ref_rejected_logps,
        ref_rejected_logps=b.ref_chosen_logps,
        margin=None if b.margin is None else -b.margin,
        tokens=None if b.tokens is None else _exchanged_tokens(b.tokens),
    )


def _exchanged_tokens(t: Tokens) -> Tokens:
    # sequences 2i and 2i+1 change places, and their tokens with them, so that sequences stay in order
    order = torch.argsort(t.sequence ^ 1, stable=True)
    moved = {name: value[order] for name, value in vars(t).items() if value is not None}
    return replace(t, **{**moved, "sequence": (t.sequence ^ 1)[order]})
