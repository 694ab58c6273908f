"""Warmup-stable-decay (MiniCPM, section 4; decay shapes of Hägele et al., arXiv:2405.18392)."""

import math
from typing import Literal

from metier.core.clock import Clock
from metier.core.part import Fraction, part


@part("schedule/wsd", paper="arXiv:2404.06395")
def wsd(
    clock: Clock,
    *,
    decay: Fraction = 0.2,
    shape: Literal["linear", "sqrt", "cosine"] = "sqrt",
    final: Fraction = 0.0,
) -> float:
    """The peak until the last ``decay`` of the run after warmup, then down to ``final`` of the peak.

    With y in [0, 1) the progress inside the decay: ``linear`` 1 - y, ``sqrt`` 1 - √y, ``cosine`` (1 + cos(π
    y)) / 2; the multiplier is ``final + (1 - final) shape(y)``. The stable stretch does not depend on the
    length of the run, so a checkpoint of it can be continued for longer.
    """
    length = decay * clock.steps
    into = clock.step - (clock.steps - length)
    if into <= 0:
        return 1.0
    y = min(1.0, into / length)
    fall = {"linear": 1 - y, "sqrt": 1 - math.sqrt(y), "cosine": 0.5 * (1 + math.cos(math.pi * y))}[shape]
    return final + (1 - final) * fall
