"""Auxiliary losses out of modules: a router's balance, extra heads, anything computed during a forward pass.

A module calls :func:`add` inside its forward; the loss module collects what was added and puts it into the step's loss,
averaged over micro-batches by their units. Outside a training forward pass the calls do nothing.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from metier.core.layout import Layout

_active: ContextVar[tuple[Layout, dict[str, Tensor]] | None] = ContextVar("metier_aux", default=None)
_last: Layout | None = None
"""The rows of the latest forward pass: a checkpointed block is computed again during backward, after ``collect``."""


@contextmanager
def collect(layout: Layout) -> Iterator[dict[str, Tensor]]:
    """Gather what modules add while the block runs: name -> scalar, summed when added several times."""
    global _last
    found: dict[str, Tensor] = {}
    _last = layout
    token = _active.set((layout, found))
    try:
        yield found
    finally:
        _active.reset(token)


def add(name: str, value: Tensor, weight: float = 1.0) -> None:
    """Add the scalar ``weight * value`` to the loss of the current forward pass and report it as metric ``name``."""
    current = _active.get()
    if current is not None:
        found = current[1]
        found[name] = found[name] + weight * value if name in found else weight * value


def layout() -> Layout | None:
    """The rows being computed, for modules that need positions or targets."""
    current = _active.get()
    if current is not None:
        return current[0]
    in_backward = torch._C._current_graph_task_id() != -1
    return _last if in_backward else None
