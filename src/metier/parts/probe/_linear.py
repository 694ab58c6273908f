"""A linear reward on fixed features of answers: the small reward model that measurements of preference data train."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize

STRENGTHS = (3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 3e-4, 1e-4)


def fit(z: np.ndarray, strength: float, start: np.ndarray | None = None) -> np.ndarray:
    """Weights ``w [D]`` that minimise ``mean_i log(1 + exp(-z_i w)) + strength/2 |w|²``, ``z [N, D]`` chosen less rejected."""
    n = len(z)

    def objective(w: np.ndarray) -> tuple[float, np.ndarray]:
        margin = z @ w
        slope = -np.exp(-np.logaddexp(0, margin)) / n  # of log(1 + exp(-margin))
        return float(np.logaddexp(0, -margin).mean() + strength / 2 * (w @ w)), z.T @ slope + strength * w

    found = minimize(objective, np.zeros(z.shape[1]) if start is None else start, jac=True, method="L-BFGS-B")
    return found.x


def accuracy(margin: np.ndarray) -> float:
    """Share of positive margins; a tie counts one half."""
    return float(np.mean((margin > 0) + 0.5 * (margin == 0)))


@dataclass(frozen=True)
class Fitted:
    """Accuracy on the test pairs, the mean ``|r_w - r_l|`` there, and the strength that was chosen."""

    accuracy: float
    confidence: float
    strength: float


@dataclass(frozen=True)
class Learner:
    """Fits on rows of ``train [N, D]``; the strength of the decay is chosen on ``valid``, figures are of ``test``.

    All three are differences of features, chosen less rejected. Each feature is divided by its root mean square among the
    training rows at hand. Of equally good strengths the largest.
    """

    train: np.ndarray
    valid: np.ndarray
    test: np.ndarray
    strengths: Sequence[float] = STRENGTHS

    def __call__(self, rows: np.ndarray, signs: np.ndarray | None = None) -> Fitted:
        """A fit on ``rows``, whose pairs are exchanged where the sign is -1."""
        z = self.train[rows]
        size = np.sqrt((z**2).mean(0)) + 1e-12
        z = z / size if signs is None else z / size * signs[:, None]
        best, w = None, None
        for strength in sorted(self.strengths, reverse=True):
            w = fit(z, strength, w)
            seen = accuracy(self.valid @ (w / size))
            if best is None or seen > best[0]:
                best = seen, strength, w / size
        assert best is not None
        margin = self.test @ best[2]
        return Fitted(accuracy(margin), float(np.abs(margin).mean()), best[1])
