"""When a loss curve counts as diverged (arXiv:2410.16682 leaves it open; these are explicit rules)."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

SMOOTHING = 0.9
RISE, SHARE, EARLY = 1.5, 0.05, 0.10
ROUNDING = 1e-6


@dataclass
class Divergence:
    """Watches the losses of a run of ``steps`` steps, in order.

    A run has diverged when (1) a loss is NaN or infinite; (2) the smoothed loss stays above 1.5 times its minimum
    so far for 5 % of the run, counted in consecutive steps; (3) at its end the smoothed loss is above that at 10 %
    of the run. Smoothed is an exponential average with 0.9 that is corrected for its start. Rule (2) needs losses above 0.
    """

    steps: int
    count: int = 0
    mean: float = 0.0
    lowest: float = math.inf
    above: int = 0
    early: float = math.inf
    reason: str = ""
    """Why it has diverged; empty while it has not."""

    @property
    def smoothed(self) -> float:
        """The smoothed loss after the steps so far."""
        return self.mean / (1 - SMOOTHING**self.count) if self.count else math.nan

    def update(self, loss: float) -> str:
        """Take the next loss. Returns the reason when the run has diverged, else ``""``."""
        if self.reason:
            return self.reason
        self.count += 1
        if not math.isfinite(loss):
            self.reason = f"loss {loss} at step {self.count}"
            return self.reason
        self.mean = SMOOTHING * self.mean + (1 - SMOOTHING) * loss
        smoothed = self.smoothed
        self.lowest = min(self.lowest, smoothed)
        self.above = self.above + 1 if smoothed > RISE * self.lowest > 0 else 0
        if self.count == max(1, round(EARLY * self.steps)):
            self.early = smoothed
        if self.above >= max(1, math.ceil(SHARE * self.steps)):
            self.reason = f"smoothed loss above {RISE:g} times its minimum for {self.above} steps, at step {self.count}"
        elif self.count >= self.steps and smoothed - self.early > ROUNDING * abs(self.early):
            self.reason = f"smoothed loss {smoothed:.4g} at the end, {self.early:.4g} at {EARLY:.0%} of the run"
        return self.reason

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state; infinities as ``None``."""
        return {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in vars(self).items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        for name, value in state.items():
            setattr(self, name, math.inf if value is None else value)


def diverged(losses: Iterable[float], steps: int) -> str:
    """Why a curve of losses, one a step of a run of ``steps`` steps, has diverged; ``""`` when it has not."""
    watch = Divergence(steps)
    for loss in losses:
        watch.update(loss)
    return watch.reason
