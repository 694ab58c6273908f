"""A weighted sum of objectives on the same scores."""

from typing import Any

import torch
from torch import Tensor

from metier.core.config import PartRef
from metier.core.errors import UsageError
from metier.core.part import NonNegative, part
from metier.parts.objective._nested import Nested, Outer

ID = "objective/combined"


@part("objective/combined", paper="weighted sum, as in arXiv:2411.10442 (MPO: preference, quality and generation loss)")
class Combined(Outer):
    """``Σ_i w_i L_i`` of objectives that read the same scores: ``{losses: [dpo, nll], weights: [1, 0.2]}``; ``[B]``.

    The model and the reference are scored once for all. ``weights`` are 1 by default. The needs are those of all parts
    together. Metrics keep their names behind that of their part (``dpo/margin``), with ``/loss`` for each part's own loss;
    a part that occurs again is ``dpo-2``.

    Raises ``UsageError`` when the number of weights differs, all are 0, or the parts read different batches.
    """

    tags = ("learning/objective/several",)
    example = {"losses": ["dpo", "nll"]}

    def __init__(self, *, losses: list[PartRef], weights: list[NonNegative] | None = None) -> None:
        self.weights = [1.0] * len(losses) if weights is None else list(weights)
        if len(self.weights) != len(losses):
            raise UsageError(f"{len(losses)} losses but {len(self.weights)} weights", where=f"{ID}.weights")
        if not any(self.weights):
            raise UsageError("at least one loss with a weight above 0 is needed", where=f"{ID}.losses")
        self.parts = _named([Nested(ID, ref, option=f"losses[{i}]") for i, ref in enumerate(losses)])
        kinds = {p.reads.__name__: p.id for p in self.parts.values()}
        if len(kinds) > 1:
            read = "; ".join(f"{id} reads {kind}" for kind, id in kinds.items())
            raise UsageError(f"all losses must read the same scores, but {read}", where=f"{ID}.losses")
        self.reads = next(iter(self.parts.values())).reads
        self.needs: frozenset[str] = frozenset().union(*(p.needs for p in self.parts.values()))

    def __call__(self, b: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss per unit and the metrics of all parts."""
        total, metrics = torch.zeros(()), {}
        for weight, (name, inner) in zip(self.weights, self.parts.items(), strict=True):
            loss, own = inner(b)
            total = total + weight * loss
            metrics.update({f"{name}/loss": loss} | {f"{name}/{key}": value for key, value in own.items()})
        return total, metrics


def _named(parts: list[Nested]) -> dict[str, Nested]:
    named: dict[str, Nested] = {}
    for p in parts:
        name, again = p.id.split("/")[1], 2
        while name in named:
            name, again = f"{p.id.split('/')[1]}-{again}", again + 1
        named[name] = p
    return named
