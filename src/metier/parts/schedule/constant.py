"""Constant: the peak learning rate to the end."""

from metier.core.clock import Clock
from metier.core.part import part


@part("schedule/constant", paper="")
def constant(clock: Clock) -> float:
    """Multiplier 1 at every step (after the warmup that the core adds)."""
    return 1.0
