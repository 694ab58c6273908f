"""Where a run stands: what schedules, sources and hooks may depend on."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Clock:
    """Position in a run. ``step`` counts finished optimizer steps, so the first update is made at ``step = 0``."""

    step: int
    steps: int
    """Total number of steps."""
    tokens: int = 0
    """Real tokens consumed so far."""
    tokens_per_step: float = 0.0
    """Expected real tokens of one step (0 when unknown)."""

    @property
    def progress(self) -> float:
        """Fraction of the run done before this step, in [0, 1)."""
        return self.step / max(1, self.steps)
