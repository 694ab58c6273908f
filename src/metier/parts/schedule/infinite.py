"""Infinite schedule: cool down to a constant rate that has no end, anneal when a model is wanted (Ibrahim et al. 2024)."""

import math
from typing import Annotated, Literal

from annotated_types import Gt, Le

from metier.core.clock import Clock
from metier.core.part import Fraction, NonNegative, Positive, part

Level = Annotated[float, Gt(0), Le(1)]


@part("schedule/infinite", paper="arXiv:2403.08763", rows=(3,))
def infinite(
    clock: Clock,
    *,
    cooldown: NonNegative = 0.25,
    constant: Level = 0.5,
    anneal: Fraction = 0.1,
    final: Level = 0.01,
    shape: Literal["inverse-sqrt", "cosine"] = "inverse-sqrt",
    alpha: Positive = 10.0,
) -> float:
    """From the peak down to ``constant`` of it, stay there, and over the last ``anneal`` of the run down to ``final``.

    After warmup (the core's), with x from 0 to 1 over the first ``cooldown`` (a fraction of the run after warmup if at most 1,
    else a number of steps: give steps if the run may be continued) and c = ``constant``:

    - ``inverse-sqrt``: ``1 + (c - 1) h(x) / h(1)`` with ``h(x) = 1 / √(1 + alpha x) - 1``
    - or ``cosine``: ``c + (1 - c) (1 + cos(π x)) / 2``
    - then c, for any length: data may be added without another warmup
    - annealing, with y from 0 to 1 over the last ``anneal``: ``c (final / c)^y``, exponentially from c to ``final`` of the peak

    Joins are continuous. Where the two stretches overlap in a short run, annealing starts from where the cooldown is. The rate
    before the annealing does not depend on the length of the run when ``cooldown`` is in steps. State and cost: none. With
    ``constant: 1`` it is a plateau with an exponential decay; ``schedule/wsd`` with ``1 - √y`` is Hägele et al.'s
    (arXiv:2405.18392) version of the same idea. The defaults here are for short runs: the paper used a longer constant stretch.
    """
    length = cooldown * clock.steps if cooldown <= 1 else cooldown
    start = clock.steps - anneal * clock.steps
    x = min(clock.step, start) / length if length > 0 else 1.0
    level = _fall(min(1.0, x), constant, shape, alpha)
    if clock.step <= start:
        return level
    y = min(1.0, (clock.step - start) / (anneal * clock.steps))
    return level * (min(final, level) / level) ** y


def _fall(x: float, constant: float, shape: str, alpha: float) -> float:
    """From 1 at x = 0 to ``constant`` at x = 1."""
    if shape == "cosine":
        return constant + (1 - constant) * 0.5 * (1 + math.cos(math.pi * x))
    return 1 + (constant - 1) * (1 / math.sqrt(1 + alpha * x) - 1) / (1 / math.sqrt(1 + alpha) - 1)
