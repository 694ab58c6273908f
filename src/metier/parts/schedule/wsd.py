"""Warmup-stable-decay (MiniCPM, section 4; decay shapes of Hägele et al., arXiv:2405.18392)."""

from metier.core.clock import Clock
from metier.core.cooldown import Shape, fall, into_cooldown
from metier.core.part import Fraction, part


@part("schedule/wsd", paper="arXiv:2404.06395", rows=(3, 11))
def wsd(
    clock: Clock,
    *,
    decay: Fraction = 0.2,
    shape: Shape = "sqrt",
    final: Fraction = 0.0,
    drop: Fraction = 1.0,
    drop_at: Fraction = 0.0,
) -> float:
    """The peak until the last ``decay`` of the run after warmup, then down to ``final`` of the plateau.

    With y in [0, 1) the progress inside the decay: ``linear`` 1 - y, ``sqrt`` 1 - √y, ``cosine`` (1 + cos(π
    y)) / 2, ``exponential`` (e^(1-y) - 1) / (e - 1); the multiplier is ``final + (1 - final) shape(y)``. The stable
    stretch does not depend on the length of the run, so a checkpoint of it can be continued for longer.

    ``drop`` is for a continued run: from ``drop_at`` (a fraction of the run after warmup; where the shorter run began its
    decay) on, everything is multiplied by it. Schaipp et al. (arXiv:2501.18965) choose it so that the learning
    rate tuned for the shorter run is right for the longer one: 0.64, 0.53, 0.43, 0.38 for 1.5, 2, 3, 4 times the length; or,
    without ``drop``, a linear ``decay`` of 0.45, 0.63, 0.88, 1. ``metier.core.convexbound`` computes both for other cases.
    """
    level = drop if clock.step >= drop_at * clock.steps else 1.0
    y = into_cooldown(clock.step, clock.steps, decay)
    return level * (final + (1 - final) * fall(shape, y))
