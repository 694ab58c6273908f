"""Arms of which a check may hold for the wrong reason: their model has broken down."""

import math
from collections.abc import Mapping

from metier.studies._arms import Arm

MOST_KL, MOST_DEGENERATE = 50.0, 0.1
"""Nats to the start, and the share of answers with more than half of the words repeated; a mean over the seeds above either is
a breakdown, as is one that is not finite."""


def diverged(arms: Mapping[str, Arm], where: str = "") -> list[str]:
    """One note that names them with both figures, or none."""
    found = []
    for name, arm in arms.items():
        kl, share = arm.mean("kl"), arm.mean("degenerate")
        if not (kl <= MOST_KL and share <= MOST_DEGENERATE):
            found.append(f"{name} (KL {_short(kl)}, degenerate {_short(share)})")
    limits = f"KL above {MOST_KL:g} nats or more than {MOST_DEGENERATE:.0%} of the answers degenerate"
    text = f"Diverged{where and f' on {where}'}, {limits}, so that these figures say little: {', '.join(found)}."
    return [text] if found else []


def _short(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else "not finite"
