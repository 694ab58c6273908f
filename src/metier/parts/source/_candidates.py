"""Pairs of whole answers that could be taken, and which are: scores in bands, the widest gaps first."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from metier.core.data.examples import Preference
from metier.parts.source._tree import Whole, shared

Contrast = Literal["any", "high", "low", "both-low", "mixed"]
Band = tuple[float, float]
ALL: Band = (-np.inf, np.inf)
BANDS: dict[str, tuple[Band, Band, float]] = {
    "any": (ALL, ALL, np.inf), "high": ((1, 1), (0, 0.5), 1), "low": ((0.5, 1), (0.5, 1), 0.34),
    "both-low": ((0, 0.5), (0, 0.5), 1),
}  # fmt: skip
"""Scores that the chosen and the rejected answer may have, and the largest gap; ours, the paper's are not known to us."""
EPS = 1e-6


@dataclass(frozen=True)
class Candidate:
    """A pair that could be taken."""

    better: Whole
    worse: Whole

    @property
    def gap(self) -> float:
        """Difference of the scores."""
        return self.better.score - self.worse.score

    def fits(self, contrast: str) -> bool:
        """Whether the scores lie in the bands of ``contrast`` and the answers differ."""
        high, low, most = BANDS[contrast]
        inside = all(b[0] - EPS <= w.score <= b[1] + EPS for b, w in ((high, self.better), (low, self.worse)))
        return inside and EPS < self.gap <= most + EPS and self.better.text != self.worse.text

    def preference(self, e: Any) -> Preference:
        """The pair for the prompt of ``e``; its row says the scores and how many tokens are shared and differ."""
        n = shared(self.better.ids, self.worse.ids)
        about = {
            "scores": [self.better.score, self.worse.score], "shared": n,
            "differ": [len(w.ids) - n for w in (self.better, self.worse)],
        }  # fmt: skip
        return Preference(e.prompt, self.better.text, self.worse.text, self.gap, meta={**e.meta, **about})


def take(found: Sequence[Candidate], contrast: str, number: int, rng: np.random.Generator) -> list[Candidate]:
    """Up to ``number`` different candidates that fit, the widest gaps first, equal ones in random order."""
    fitting = [c for c in found if c.fits(contrast)]
    order = sorted(rng.permutation(len(fitting)).tolist(), key=lambda i: -round(fitting[i].gap, 6))
    taken: dict[tuple[str, str], Candidate] = {}
    for i in order:
        taken.setdefault((fitting[i].better.text, fitting[i].worse.text), fitting[i])
    return list(taken.values())[:number]
