"""How a learning rate falls from its plateau to its end: shapes from 1 to 0 over the unit interval, ends exact."""

import math
from collections.abc import Callable
from typing import Literal

Shape = Literal["linear", "sqrt", "cosine", "exponential"]
SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda y: 1 - y,
    "sqrt": lambda y: 1 - math.sqrt(y),
    "cosine": lambda y: 0.5 * (1 + math.cos(math.pi * y)),
    "exponential": lambda y: math.expm1(1 - y) / math.expm1(1),
}
"""``1 - y``; ``1 - √y``; ``(1 + cos(π y)) / 2``; ``(e^(1-y) - 1) / (e - 1)``."""


def fall(shape: Shape, y: float) -> float:
    """The value at ``y``; 1 before 0, and 0 from 1 on."""
    return SHAPES[shape](min(1.0, max(0.0, y)))


def into_cooldown(step: int, steps: int, fraction: float) -> float:
    """Progress inside the last ``fraction`` of a run: 0 or less before it, 1 at the end.

    The stretch need not be a whole number of steps. A run without one gives ``-inf``.
    """
    length = fraction * steps
    return (step - (steps - length)) / length if length > 0 else -math.inf
