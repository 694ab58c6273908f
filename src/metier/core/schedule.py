"""Learning-rate schedules: functions of the clock, warmup, and the bridge to torch's schedulers."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from metier.core.clock import Clock
from metier.core.errors import MetierError, UsageError
from metier.core.part import Built, NonNegative

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LambdaLR


def common_options(*, warmup: NonNegative = 0.0) -> None:
    """Options that every schedule shares. ``warmup``: a fraction of the run if below 1, else a number of
    steps.
    """


class Schedule:
    """Multiplier of the peak learning rate: linear warmup over w steps, then a schedule function.

    At step s < w (steps count from 0): ``(s + 1)/w`` times the schedule's value at its own start, so the
    first update is not wasted and the two stretches join whatever that value is. From step w on, the function
    gets a clock of the run *after* the warmup: ``step - w`` of ``steps - w``, so its ``progress`` runs from 0
    to 1. Tokens are never shifted.
    """

    def __init__(self, built: Built | Callable[[Clock], float], *, warmup: float = 0.0) -> None:
        if warmup < 0 or (warmup >= 1 and warmup != int(warmup)):
            raise UsageError(f"warmup = {warmup}: give a fraction of the run below 1, or a whole number of steps")
        self.function: Any = built.obj if isinstance(built, Built) else built
        self.name = built.id if isinstance(built, Built) else getattr(built, "__name__", "schedule")
        self.warmup = warmup

    def warmup_steps(self, steps: int) -> int:
        """Number of warmup steps in a run of ``steps``; a fraction is rounded up."""
        if self.warmup >= 1:
            return int(self.warmup)
        return math.ceil(round(self.warmup * steps, 9))

    def at(self, clock: Clock) -> float:
        """The multiplier for the update made at ``clock``. Raises ``MetierError`` if the function gives no
        number.
        """
        w = self.warmup_steps(clock.steps)
        left = max(1, clock.steps - w)
        if clock.step < w:
            start = Clock(0, left, round(w * clock.tokens_per_step), clock.tokens_per_step)
            return (clock.step + 1) / w * self._value(start)
        return self._value(Clock(clock.step - w, left, clock.tokens, clock.tokens_per_step))

    def _value(self, clock: Clock) -> float:
        value = float(self.function(clock))
        if not math.isfinite(value) or value < 0:
            raise MetierError(f"{self.name} gives {value} at step {clock.step} of {clock.steps}")
        return value


def torch_scheduler(
    optimizer: "Optimizer",
    built_or_fn: Built | Callable[[Clock], float],
    steps: int,
    warmup: float = 0.0,
    *,
    tokens_per_step: float = 0.0,
) -> "LambdaLR":
    """A ``LambdaLR`` for training loops that are not ours; after ``steps`` the value of the end is kept."""
    from torch.optim.lr_scheduler import LambdaLR

    schedule = Schedule(built_or_fn, warmup=warmup)

    def multiplier(step: int) -> float:
        done = min(step, steps)
        return schedule.at(Clock(done, steps, round(done * tokens_per_step), tokens_per_step))

    return LambdaLR(optimizer, multiplier)
