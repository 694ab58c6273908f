"""Model and objective as one module: a layout goes in, the loss sum comes out.

DDP and FSDP2 wrap this module, so everything that uses parameters happens inside its ``forward``.
"""

import typing
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from metier.core import aux
from metier.core.batch import Batch, Labels, Lists, Pairs, Rated, Rollouts, Tokens
from metier.core.errors import UsageError
from metier.core.forward import is_causal
from metier.core.layout import Layout
from metier.core.part import Built
from metier.core.scores import Reference, drawn_targets, score

TYPES: tuple[type, ...] = (Tokens, Pairs, Rated, Lists, Rollouts, Labels)


def batch_type(objective: Any) -> type:
    """The batch type an objective reads: its ``reads`` attribute, else the annotation of its first parameter."""
    if hasattr(objective, "reads"):
        return objective.reads
    function = objective.func if isinstance(objective, partial) else objective
    hints = typing.get_type_hints(function)
    first = next(iter(hints.values()))
    if first not in TYPES:
        raise TypeError(f"{function.__name__}: the first parameter must be annotated with one of core.batch's types")
    return first


class LossModule(nn.Module):
    """``forward(layout) -> (loss sum, units, {metric: sum over units})``."""

    def __init__(self, model: Any, objective: Built, reference: Reference | None = None) -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        self.reads = batch_type(objective.obj)
        self.needs = frozenset(getattr(objective.obj, "needs", objective.card.needs))
        self.reference = reference
        self._rare = not isinstance(objective.obj, partial)
        if not self._rare and self.reads is not Labels and not is_causal(model):
            raise UsageError(
                f"{objective.id} predicts each token from those before it, but {model.config.model_type} sees them all",
                hint="Use a causal model, or objective: classify.",
            )  # fmt: skip

    def score(self, layout: Layout, **overrides: Any) -> Batch:
        """Scores of a layout as the objective's batch type; ``overrides`` go to the forward pass."""
        return score(self.model, layout, self.reads, reference=self.reference, needs=self.needs, **overrides)

    def forward(self, layout: Layout, draw: torch.Generator | None = None) -> tuple[Tensor, int, dict[str, Tensor]]:
        """Loss sum, units and metric sums of a layout; all zero for a filler.

        With ``draw`` the targets are replaced by tokens drawn from the model's own distribution.
        """
        if draw is not None:
            layout = replace(layout, target=drawn_targets(self.model, layout, draw))
        with aux.collect(layout) as extra:
            obj = self.objective.obj
            result = obj(self.score, layout) if self._rare else obj(self.score(layout))
        loss, metrics = result if isinstance(result, tuple) else (result, {})
        units = 0 if layout.filler else loss.numel()
        total = loss.sum() if units else loss.sum() * 0
        for name, value in extra.items():
            total = total + value * units if self.model.training else total  # a held-out loss stays comparable
            metrics = {**metrics, name: value.detach()}
        return total, units, {k: _total(v.detach(), units) for k, v in metrics.items()}


def _total(values: Tensor, units: int) -> Tensor:
    """A metric, per unit or one number for all, as its sum over the units; 0 where there are none."""
    return values.float().mean() * units if units else torch.zeros((), device=values.device)
