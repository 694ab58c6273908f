"""Cosine decay of the learning rate without restarts (Loshchilov & Hutter, SGDR, eq. 5)."""

import math

from metier.core.clock import Clock
from metier.core.part import Fraction, part


@part("schedule/cosine", paper="arXiv:1608.03983")
def cosine(clock: Clock, *, final: Fraction = 0.0) -> float:
    """Half a cosine from the peak to ``final`` of it: ``final + (1 - final) (1 + cos(π x)) / 2``, x the
    progress.
    """
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * clock.progress))
