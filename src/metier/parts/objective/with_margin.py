"""A required margin that grows with the difference of given scores."""

from dataclasses import replace
from typing import Literal

from torch import Tensor

from metier.core.batch import Pairs
from metier.core.config import PartRef
from metier.core.errors import UsageError
from metier.core.part import Positive, part
from metier.parts.objective._nested import Nested, Wrapper

ID = "objective/with-margin"


@part("objective/with-margin", paper="arXiv:2307.09288 (Llama 2), equation 2, on log-probabilities")
class WithMargin(Wrapper):
    """The pairwise objective ``of``, whose chosen answers must lead by ``scale`` × score difference more; ``[B]``.

    The chosen log-probability is lowered by ``scale · (s_w - s_l)`` before the inner objective sees it: for ``dpo``,
    ``-log σ(β[Δ_w - Δ_l - scale · (s_w - s_l)])``. Units: ``scale`` is in nats per unit of score, of the log-probability
    summed over the answer, whatever the inner β; with ``per: token`` in nats per token of the chosen answer, for objectives
    that average (``simpo``, ``ln-dpo``). Around ``length-normalized`` choose ``per: token``; inside it, ``per: answer``.
    ``odpo`` with ``offset: linear`` and ``alpha`` is this with ``scale = alpha/β``.

    Meant for objectives of the margin alone. Where the chosen likelihood has a term of its own (``nca``, ``dpop``, ``nll``),
    that term is shifted too. Metrics are those of the scores as they are, and the ``offset`` in nats.

    Raises ``UsageError`` when the data have no scores.
    """

    tags = ("data/quality/gap",)
    example = {"of": "dpo"}

    def __init__(self, *, of: PartRef, scale: Positive = 1.0, per: Literal["answer", "token"] = "answer") -> None:
        inner = Nested(ID, of, (Pairs,))
        if "tokens" in inner.needs:
            raise UsageError(
                f"{inner.id} reads scores of single tokens, which a margin per answer cannot lower", where=inner.place
            )
        self._around(inner)
        self.scale, self.per = scale, per

    def __call__(self, b: Pairs) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss ``[B]``, the inner objective's metrics without the offset, and the offset."""
        loss, _ = self.inner(self._seen(b))
        _, metrics = self.inner(b)
        return loss, {**metrics, "offset": self._offset(b)}

    def _seen(self, b: Pairs) -> Pairs:
        return replace(b, chosen_logps=b.chosen_logps - self._offset(b))

    def _offset(self, b: Pairs) -> Tensor:
        if b.margin is None:
            raise UsageError(
                f"{ID} needs the scores of both answers, and these data have none",
                hint="Give each pair `margin`, or `score_chosen` and `score_rejected`.",
            )
        offset = self.scale * b.margin
        return offset * b.chosen_len.clamp(min=1) if self.per == "token" else offset
