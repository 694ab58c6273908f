"""Linear decay of the learning rate (Defazio et al. 2023: optimal for the last iterate of convex SGD)."""

from metier.core.clock import Clock
from metier.core.part import Fraction, part


@part("schedule/linear", paper="arXiv:2310.07831")
def linear(clock: Clock, *, final: Fraction = 0.0) -> float:
    """From the peak straight down to ``final`` of it: ``1 - (1 - final) x`` with x the progress.

    The update at step s uses x = s / steps, so the first one is made at the peak and none at ``final``
    itself.
    """
    return 1 - (1 - final) * clock.progress
