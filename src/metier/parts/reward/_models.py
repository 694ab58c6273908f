"""Models that judge: loaded when first asked, kept, and run without gradient over many inputs at once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metier.core import aux, models
from metier.core.data.encode import Encoder, Item
from metier.core.data.loader import Shape
from metier.core.errors import UsageError
from metier.core.scores import evaluating
from metier.core.separate import why_apart

BUDGET = 8192
"""Tokens, padding included, computed at once."""


@dataclass(frozen=True)
class Judging:
    """A model on its device with what encodes for it."""

    model: Any
    tokenizer: Any
    encoder: Encoder
    shape: Shape
    device: torch.device

    @torch.no_grad()
    def scored(self, items: Sequence[Item], score: Callable[[Any, Any], Tensor]) -> list[np.ndarray]:
        """``score(model, layout)`` gives a row per answer (or per item without answers): those of each item, in order."""
        found: list[np.ndarray] = [np.zeros(0)] * len(items)
        micros = self.shape.micros(items)
        for rows, layout in zip(micros, self.shape.layouts(items, micros), strict=True):
            order = [i for row in rows for i in row]
            with evaluating(self.model), aux.collect(layout):
                values = score(self.model, layout.to(self.device)).double().cpu()
            for i, own in zip(order, values.split([max(1, len(items[i].answers)) for i in order]), strict=True):
                found[i] = own.numpy()
        return found


@lru_cache(maxsize=4)
def opened(name: str, task: models.Task, max_length: int, device: str) -> Judging:
    """A run folder, a model folder, a lab model, an installed or a hub model; kept for the next call.

    Raises ``UsageError`` when it is not of the task, or cannot be found.
    """
    if (Path(name) / "run.json").is_file():
        from metier.core.trained import open_run

        bundle = open_run(name).bundle
    else:
        bundle = models.load(name, task=task, num_labels=1)
    model = bundle.model.eval().requires_grad_(False)
    _check(model, name, task)
    where = torch.device(device) if device != "auto" else _fastest()
    model.to(where)
    limit = min(max_length, getattr(model.config, "max_position_embeddings", None) or max_length)
    encoder = Encoder(bundle.tokenizer, max_length=limit, truncate="left-prompt", on_empty="drop")
    shape = Shape(bundle.tokenizer.pad_token_id or 0, BUDGET, separate=bool(why_apart(model)))
    return Judging(model, bundle.tokenizer, encoder, shape, where)


def _fastest() -> torch.device:
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def _check(model: Any, name: str, task: models.Task) -> None:
    scalar = getattr(getattr(model, "score", None), "out_features", None) == 1
    if task == "classify" and not scalar:
        raise UsageError(
            f"{name} is no reward model: it has no head with one output on each token",
            hint="Train one with objective: bradley-terry, or use a …ForSequenceClassification folder with num_labels = 1.",
        )
    if task == "lm" and (scalar or model.get_output_embeddings() is None):
        raise UsageError(f"{name} does not write text, so it cannot be asked", hint="See: reward/reward-model")
