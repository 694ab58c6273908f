"""What every schedule part must satisfy."""

import math
from itertools import pairwise
from typing import Any

from metier.core import part
from metier.core.clock import Clock
from metier.core.schedule import Schedule

LENGTHS = (1, 2, 10, 97, 1000)
TOKENS = 4096.0
BOUND = 1.0 + 1e-9


def check(id: str) -> list[str]:
    """Run every check on the part ``id`` with its default options. Returns their names.

    Raises ``AssertionError`` at the first that fails.
    """
    kind, _, name = id.partition("/")
    built = part.build(kind, name)
    for run in CHECKS:
        run(id, built)
    return [run.__name__.removeprefix("_") for run in CHECKS]


def _curve(schedule: Schedule, steps: int, start: int = 0) -> list[float]:
    return [schedule.at(Clock(s, steps, round(s * TOKENS), TOKENS)) for s in range(start, steps)]


def _bounded(id: str, built: Any) -> None:
    """Finite and between 0 and the peak, at every step of runs of any length, with and without warmup."""
    for steps in LENGTHS:
        for warmup in (0.0, 0.1, 3.0):
            for step, value in enumerate(_curve(Schedule(built, warmup=warmup), steps)):
                ok = math.isfinite(value) and 0 <= value <= BOUND
                assert ok, f"{id} gives {value} at step {step} of {steps}"


def _moves(id: str, built: Any) -> None:
    """Some update is made: the multiplier is not 0 throughout, and not 0 at the first step."""
    for steps in LENGTHS:
        assert _curve(Schedule(built), steps)[0] > 0, f"{id} wastes the first step of {steps}"


def _ends(id: str, built: Any) -> None:
    """The value at the very end, where torch's schedulers ask though no update is made, is in range."""
    for steps in LENGTHS:
        last = Schedule(built).at(Clock(steps, steps, round(steps * TOKENS), TOKENS))
        assert math.isfinite(last), f"{id} gives {last} at the end of {steps} steps"
        assert 0 <= last <= BOUND, f"{id} ends at {last} of the peak"


def _resumes(id: str, built: Any) -> None:
    """A function of the clock alone: a run continued at any step, by a new object, sees the same values."""
    whole = _curve(Schedule(built, warmup=0.1), 97)
    for step in (0, 1, 9, 10, 50, 96):
        fresh = part.build(*id.split("/"))
        assert _curve(Schedule(fresh, warmup=0.1), 97, step) == whole[step:], f"{id} depends on where it was started"


def _joins_warmup(id: str, built: Any) -> None:
    """Warmup rises in equal steps to the value where the schedule takes over."""
    schedule = Schedule(built, warmup=10)
    curve = _curve(schedule, 1000)
    rises = [b - a for a, b in pairwise(curve[:10])]
    assert max(rises) - min(rises) < 1e-9, f"{id}: the warmup is not linear"
    assert abs(curve[10] - curve[9]) <= rises[0] + 1e-9, f"{id}: jumps after the warmup"


CHECKS = (_bounded, _moves, _ends, _resumes, _joins_warmup)
