"""Model and objective as one module: a layout goes in, the loss sum comes out.

DDP and FSDP2 wrap this module, so everything that uses parameters happens inside its ``forward``.
"""

import inspect
import typing
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from metier.core import aux
from metier.core.batch import Batch, Labels, Lists, Pairs, Rated, Rewards, Rollouts, Tokens
from metier.core.errors import UsageError
from metier.core.forward import is_causal
from metier.core.layout import Layout
from metier.core.part import Built
from metier.core.scores import Reference, drawn_targets, score
from metier.core.wholebatch import Slopes, carried, policy

TYPES: tuple[type, ...] = (Tokens, Pairs, Rated, Lists, Rewards, Rollouts, Labels)


def batch_type(objective: Any) -> type:
    """The batch type an objective reads: its ``reads`` attribute, else the annotation of its first parameter."""
    if hasattr(objective, "reads"):
        return objective.reads
    function = objective.func if isinstance(objective, partial) else type(objective).__call__
    hints = typing.get_type_hints(function)
    first = next(iter(hints.values()))
    if first not in TYPES:
        raise TypeError(f"{function.__qualname__}: the first parameter must be annotated with one of core.batch's types")
    return first


def scores_again(objective: Any) -> bool:
    """Whether an objective takes ``(forward, layout)`` and scores the rows itself, instead of a typed batch."""
    positional = [p for p in inspect.signature(objective).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    return len(positional) == 2


class LossModule(nn.Module):
    """``forward(layout) -> (loss sum, units, {metric: sum over units})``."""

    def __init__(self, model: Any, objective: Built, reference: Reference | None = None) -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        self.reads = batch_type(objective.obj)
        self.needs = objective.needs
        self.reference = reference
        self._scores_again = scores_again(objective.obj)
        self._fresh = False  # what is scored before the first step is not observed
        if not self._scores_again and self.reads is not Labels and not is_causal(model):
            raise UsageError(
                f"{objective.id} predicts each token from those before it, but {model.config.model_type} sees them all",
                hint="Use a causal model, or objective: classify.",
            )  # fmt: skip

    def begin_step(self, progress: float) -> None:
        """Tell the objective how much of the run is done; what it observes next belongs to a new step."""
        self._fresh = True
        if hasattr(self.objective.obj, "progress"):
            self.objective.obj.progress = progress

    def score(self, layout: Layout, **overrides: Any) -> Batch:
        """Scores of a layout as the objective's batch type; ``overrides`` go to the forward pass.

        An objective with ``condense`` keeps of them what it needs, before those of a whole step are brought together.
        """
        batch = score(self.model, layout, self.reads, reference=self.reference, needs=self.needs, **overrides)
        condense = getattr(self.objective.obj, "condense", None)
        return condense(batch) if condense else batch

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The objective's loss and metrics per unit of scored rows; one with a state observes each training step once."""
        if self.training and self._fresh and hasattr(self.objective.obj, "observe"):
            if all(bool(v.isfinite().all()) for v in policy(batch).values()):  # else the guard skips this step
                self.objective.obj.observe(batch)
            self._fresh = False
        return _with_metrics(self.objective.obj(batch))

    def forward(
        self, layout: Layout, draw: torch.Generator | None = None, *, scores_only: bool = False, slopes: Slopes | None = None
    ) -> Any:
        """Loss sum, units and metric sums of a layout; all zero for a filler.

        With ``draw`` the targets are replaced by tokens drawn from the model's own distribution. The last two serve losses
        of a whole step: ``scores_only`` returns the typed batch, and with ``slopes`` the loss is replaced by a 0 whose
        gradient follows them.
        """
        if draw is not None:
            layout = replace(layout, target=drawn_targets(self.model, layout, draw))
        if scores_only:
            return self.score(layout)
        with aux.collect(layout) as extra:
            if slopes is not None:
                batch = self.score(layout)
                slope = carried(batch, slopes)
                loss, metrics, units = slope - slope.detach(), {}, len(layout.ids)
            elif self._scores_again:
                loss, metrics = _with_metrics(self.objective.obj(self.score, layout))
                units = loss.numel()
            else:
                loss, metrics = self.loss(self.score(layout))
                units = loss.numel()
        units = 0 if layout.filler else units
        total = loss.sum() if units else loss.sum() * 0
        for name, value in extra.items():
            total = total + value * units if self.model.training else total  # a held-out loss stays comparable
            metrics = {**metrics, name: value.detach()}
        return total, units, {k: _total(v.detach(), units) for k, v in metrics.items()}


def _with_metrics(result: Any) -> tuple[Tensor, dict[str, Tensor]]:
    return result if isinstance(result, tuple) else (result, {})


def _total(values: Tensor, units: int) -> Tensor:
    """A metric, per unit or one number for all, as its sum over the units; 0 where there are none."""
    return values.float().mean() * units if units else torch.zeros((), device=values.device)
