"""What probes see: a model with its objective and some layouts, in evaluation mode, left as it was found.

A probe is a function ``f(probe, *, …) -> dict`` whose result is JSON-able: numbers, strings, lists and dicts
of them.
"""

import contextlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from metier.core import state
from metier.core.batch import Batch
from metier.core.engine import Engine
from metier.core.errors import UsageError
from metier.core.events import Dispatcher
from metier.core.layout import Layout
from metier.core.models import Bundle
from metier.core.scores import score


@dataclass(frozen=True)
class Probe:
    """A model to be measured, and the data to measure it on."""

    bundle: Bundle
    module: nn.Module
    """Maps a layout to ``(loss sum, units, metric sums)``."""
    reads: type
    """The batch type of the run's objective (``metier.core.batch``)."""
    layouts: Sequence[Layout]
    engine: Engine
    folder: Path | None = None
    """The run's folder, when a finished or interrupted run is probed."""

    @property
    def model(self) -> Any:
        """The transformers model."""
        return self.bundle.model

    def score(self, layout: Layout, *, reads: type | None = None, needs: tuple[str, ...] = ()) -> Batch:
        """Scores of one layout without gradient, by default as the run's objective reads them."""
        with torch.no_grad(), self.engine.autocast():
            return score(self.model, layout.to(self.engine.device), reads or self.reads, needs=frozenset(needs))

    def gradient(self, layout: Layout) -> dict[str, Tensor]:
        """Gradient of the mean loss per unit of one layout, by parameter name; nothing is left in
        ``.grad``."""
        named = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        with torch.enable_grad(), self.engine.autocast():
            total, units, _ = self.module(layout.to(self.engine.device))
        found = torch.autograd.grad(total / units, list(named.values()), allow_unused=True)
        return {n: g for n, g in zip(named, found, strict=True) if g is not None}

    def loss(self, layout: Layout) -> tuple[float, int]:
        """Loss sum and units of one layout."""
        with torch.no_grad(), self.engine.autocast():
            total, units, _ = self.module(layout.to(self.engine.device))
        return float(total), units


@contextlib.contextmanager
def undisturbed(probe: Probe, seed: int = 0) -> Iterator[Probe]:
    """Evaluation mode and a fixed random state inside; modes, gradients and generators as before
    afterwards."""
    modes = {m: m.training for m in probe.module.modules()}
    grads = [(p, p.grad) for p in probe.model.parameters()]
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    probe.module.eval()
    try:
        yield probe
    finally:
        for m, mode in modes.items():
            m.training = mode
        for p, grad in grads:
            p.grad = grad
        torch.set_rng_state(state[0])
        random.setstate(state[1])
        np.random.set_state(state[2])


def checkpoints(probe: Probe) -> Iterator[int | None]:
    """Steps of the complete checkpoints in the run's folder, oldest first; meanwhile the model has their weights.

    Without any, ``None`` once, for the model as it is. The model is as before when the iterator is used up or closed.
    Parts that show an evaluation other weights (such as averages) are not asked.
    """
    own, before = probe.model.state_dict(keep_vars=True), {}
    paths = sorted((probe.folder / "checkpoints").glob("step-*")) if probe.folder else []
    try:
        for path in paths:
            try:
                found = state.read(path)
            except state.Damaged:
                continue
            for name, value in found.tensors["model"].items():
                before.setdefault(name, own[name].detach().clone())
                own[name].detach().copy_(value)
            yield found.step
        if not before:
            yield None
    finally:
        for name, value in before.items():
            own[name].detach().copy_(value)


@contextlib.contextmanager
def as_evaluated(session: Any) -> Iterator[None]:
    """A session's parts switched to what an evaluation would see (such as averaged weights), and back."""
    dispatch, ctx = Dispatcher(session.listeners), session.context
    dispatch("on_start", ctx)
    dispatch("on_eval_start", ctx)
    try:
        yield
    finally:
        dispatch("on_eval_end", ctx)


def probe_session(session: Any, *, on: str = "auto", batches: int | None = None, folder: Path | None = None) -> Probe:
    """The model of a session with layouts of its held-out (``eval``) or training data (``train``).

    ``auto`` takes held-out data when the run has any; training data go on where the session stands, or begin anew when
    they have ended. ``batches`` limits the number of layouts. Raises ``UsageError`` when there are no such data.
    """
    ctx = session.context
    if on == "auto":
        on = "eval" if session.eval_layouts else "train"
    if on == "eval" and not session.eval_layouts:
        raise UsageError("the run has no held-out data", hint="Give data.eval or data.eval_fraction, or probe --on train.")
    found: list[Layout] = list(session.eval_layouts) if on == "eval" else []
    if on == "train":
        found = _training(session.loader, batches or 1)
        if not found:
            session.loader.position = session.loader.epoch = session.loader.drawn = 0
            found = _training(session.loader, batches or 1)
    reads = getattr(ctx.module, "module", ctx.module).reads
    return Probe(ctx.bundle, ctx.module, reads, found[:batches], ctx.engine, folder)


def _training(loader: Any, layouts: int) -> list[Layout]:
    found: list[Layout] = []
    for step in loader:
        found += step.micro
        if len(found) >= layouts:
            break
    return found
