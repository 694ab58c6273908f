"""Any preference objective on log-probabilities per token."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from metier.core.batch import Lists, Pairs, Rated
from metier.core.config import PartRef
from metier.core.errors import UsageError
from metier.core.part import part
from metier.parts.objective._nested import Nested, Wrapper

ID = "objective/length-normalized"
UNEVEN = {"tokens": "single tokens", "samples": "sampled answers", "mismatch": "answers of other prompts"}


@part("objective/length-normalized", paper="arXiv:2407.15229 (LN-DPO), for any objective", rows=(92,))
class LengthNormalized(Wrapper):
    """The objective ``of`` on log-probabilities divided by their answer's number of loss tokens, with all lengths 1; ``[B]``.

    Policy and reference alike. Around ``dpo`` it is ``ln-dpo``. Averaged margins are one to two orders of magnitude
    smaller: give the inner objective a larger β (its default stays what it is). Objectives that average already do not
    change; penalties on length differences vanish, since all lengths are then equal. Metrics are the inner objective's.

    Raises ``UsageError`` around objectives that read scores of single tokens or of further answers.
    """

    tags = ("model/generation/length",)
    example = {"of": "dpo"}

    def __init__(self, *, of: PartRef) -> None:
        inner = Nested(ID, of, (Pairs, Rated, Lists))
        for need, what in UNEVEN.items():
            if need in inner.needs:
                raise UsageError(f"{inner.id} reads scores of {what}, which have no normalized form here", where=inner.place)
        self._around(inner)

    def __call__(self, b: Pairs | Rated | Lists) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss ``[B]`` and the inner objective's metrics."""
        return self.inner(self._seen(b))

    def _seen(self, b: Pairs | Rated | Lists) -> Any:
        return per_token(b)


def per_token(b: Pairs | Rated | Lists) -> Pairs | Rated | Lists:
    """The batch with every log-probability divided by its answer's length (at least 1), and lengths of 1."""
    if not isinstance(b, Pairs):
        n = b.length.clamp(min=1)
        return replace(b, logps=b.logps / n, ref_logps=_over(b.ref_logps, n), length=torch.ones_like(n))
    w, l = b.chosen_len.clamp(min=1), b.rejected_len.clamp(min=1)  # noqa: E741
    return replace(
        b,
        chosen_logps=b.chosen_logps / w,
        rejected_logps=b.rejected_logps / l,
        chosen_len=torch.ones_like(w),
        rejected_len=torch.ones_like(l),
        ref_chosen_logps=_over(b.ref_chosen_logps, w),
        ref_rejected_logps=_over(b.ref_rejected_logps, l),
    )


def _over(logps: Tensor | None, n: Tensor) -> Tensor | None:
    return None if logps is None else logps / n
