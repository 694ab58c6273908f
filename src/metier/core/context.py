"""What the parts of a run may see and use: passed to every event as ``ctx``."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from metier.core.clock import Clock
from metier.core.config import Run
from metier.core.engine import Engine
from metier.core.layout import Layout
from metier.core.models import Bundle
from metier.core.reference import ReferenceModel


def derive_seed(*parts: object) -> int:
    """A 63-bit seed that depends on every part, in order, and on nothing else."""
    text = "\x1f".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1


@dataclass
class Context:
    """A run as its parts see it."""

    run: Run
    bundle: Bundle
    engine: Engine
    optimizer: torch.optim.Optimizer
    module: nn.Module
    """Maps a layout to ``(loss sum, units, metric sums)``; wraps the model and the objective."""
    folder: Path
    clock: Clock
    emit: Callable[[dict[str, Any]], None]
    """Append an event to the run's log."""
    evaluate: Callable[[], dict[str, float]]
    """Loss and metrics on the held-out data, with evaluation hooks applied."""
    attached: Any = None
    """The adapter (``metier.core.adapt.Attached``) when the run has one."""
    reference: ReferenceModel | None = None
    """The reference model, when the run asks one in every step."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """Metrics of the current step; parts may add to them in ``on_step``."""
    layouts: list[Layout] = field(default_factory=list)
    """This process's micro-batches of the current step."""

    @property
    def model(self) -> nn.Module:
        """The model being trained, transformed and adapted."""
        return self.bundle.model

    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        """Named parameters that currently receive gradients."""
        return [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]

    def generator(self, name: str) -> torch.Generator:
        """A random stream of its own for this step: a function of (seed, name, step, process), so it needs no saving."""
        seed = derive_seed(self.run.train.seed, name, self.clock.step, self.engine.rank)
        return torch.Generator(device=self.engine.device).manual_seed(seed)

    def loss(self, layout: Layout) -> Tensor:
        """Mean loss per unit of one layout, with gradient, outside the step's own accounting."""
        with self.engine.autocast():
            total, units, _ = self.module(layout)
        return total / units

    @contextmanager
    def gradients_kept(self) -> Iterator[None]:
        """Set the gradients aside, so that a part can compute others; they are put back afterwards."""
        kept = [(p, p.grad) for _, p in self.trainable()]
        for p, _ in kept:
            p.grad = None
        try:
            yield
        finally:
            for p, grad in kept:
                p.grad = grad
