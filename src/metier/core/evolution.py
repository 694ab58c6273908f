"""Natural evolution strategies with antithetic pairs: minimise a function of a flat vector from its values alone.

The gradient of ``E_ε J(φ + σ ε)``, ε standard normal, is estimated by ``1/(2nσ) Σ_i (J(φ+σε_i) - J(φ-σε_i)) ε_i`` over n
pairs (Salimans et al. 2017, arXiv:1703.03864), from values that may be shaped first, and followed by Adam.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from metier.core.errors import MetierError, UsageError

Vector = NDArray[np.float64]
Shaping = Literal["rank", "z", "none"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How far, how many and how fast. Raises ``UsageError`` for values that make no sense."""

    sigma: float = 0.05
    """Standard deviation of the perturbations."""
    pairs: int = 8
    lr: float = 0.01
    """Adam's step size."""
    shaping: Shaping = "rank"
    """``rank``: values replaced by their ranks in [-1/2, 1/2]; ``z``: standardised; ``none``: as they are, the unbiased
    estimate. All values of an iteration together."""
    beta1: float = 0.9
    beta2: float = 0.999
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("sigma", "lr", "pairs"):
            if not getattr(self, name) > 0:
                raise UsageError(f"{name} = {getattr(self, name)}: must be above 0")
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise UsageError(f"betas {self.beta1}, {self.beta2}: must be in [0, 1)")
        if self.shaping not in ("rank", "z", "none"):
            raise UsageError(f"shaping = {self.shaping!r}: must be rank, z or none")


def perturbations(size: int, pairs: int, *, seed: int, iteration: int) -> Vector:
    """Standard normal ``[pairs, size]``: a function of the arguments, so that nothing needs saving."""
    return np.random.default_rng([seed, iteration]).standard_normal((pairs, size))


def shaped(values: ArrayLike, how: Shaping) -> Vector:
    """Values of the same shape, to be minimised, made comparable.

    A value that is not finite counts as the worst finite one of the call (with ranks: as worse than all); where none is
    finite all are 0. Equal values stay equal.
    """
    x = np.array(values, dtype=np.float64)
    finite = np.isfinite(x)
    if not finite.any():
        return np.zeros_like(x)
    if how == "rank":
        return _ranks(np.where(finite, x, np.inf))
    x = np.where(finite, x, x[finite].max())
    if how == "none":
        return x
    spread = x.std()
    return (x - x.mean()) / spread if spread > 0 else np.zeros_like(x)


def _ranks(x: Vector) -> Vector:
    """Ranks from -1/2 to 1/2; equal values share the mean of theirs."""
    _, inverse, count = np.unique(x.ravel(), return_inverse=True, return_counts=True)
    middle = np.cumsum(count) - (count + 1) / 2
    return (middle / max(1, x.size - 1) - 0.5)[inverse].reshape(x.shape)


def estimate(noise: Vector, values: ArrayLike, sigma: float, how: Shaping = "none") -> Vector:
    """The gradient ``[size]`` from ``noise`` [pairs, size] and values [pairs, 2] at ``+`` and ``-``."""
    x = shaped(values, how)
    return (x[:, 0] - x[:, 1]) @ noise / (2 * len(noise) * sigma)


class Evolution:
    """A search under way: ``ask`` for candidates, ``tell`` their values, read ``mean``."""

    def __init__(self, start: ArrayLike, settings: Settings) -> None:
        self.settings = settings
        self.mean: Vector = np.array(start, dtype=np.float64).ravel()
        self.m, self.v = np.zeros_like(self.mean), np.zeros_like(self.mean)
        self.iteration = 0
        """Finished iterations."""

    def noise(self) -> Vector:
        """Perturbations of this iteration."""
        return perturbations(self.mean.size, self.settings.pairs, seed=self.settings.seed, iteration=self.iteration)

    def ask(self) -> Vector:
        """Candidates ``[pairs, 2, size]``: plus and minus. The same until ``tell``."""
        away = self.settings.sigma * self.noise()
        return np.stack([self.mean + away, self.mean - away], axis=1)

    def tell(self, values: ArrayLike) -> Vector:
        """Take the candidates' values ``[pairs, 2]``, lower is better, and move the mean. Returns the gradient."""
        s = self.settings
        x = np.asarray(values, dtype=np.float64)
        if x.shape != (s.pairs, 2):
            raise MetierError(f"expected values of shape [{s.pairs}, 2], got {list(x.shape)}")
        g = estimate(self.noise(), x, s.sigma, s.shaping)
        self.iteration += 1
        self.m = s.beta1 * self.m + (1 - s.beta1) * g
        self.v = s.beta2 * self.v + (1 - s.beta2) * g * g
        m, v = self.m / (1 - s.beta1**self.iteration), self.v / (1 - s.beta2**self.iteration)
        self.mean = self.mean - s.lr * m / (np.sqrt(v) + 1e-8)
        return g

    def state_dict(self) -> dict[str, Any]:
        """Everything the search needs to go on."""
        return {"iteration": self.iteration, **{k: getattr(self, k).copy() for k in ("mean", "m", "v")}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved search. Raises ``MetierError`` when it is of another size."""
        found = {k: np.array(state[k], dtype=np.float64) for k in ("mean", "m", "v")}
        for key, value in found.items():
            if value.shape != self.mean.shape:
                raise MetierError(f"the saved search has {value.size} numbers in {key}, this one {self.mean.size}")
        self.mean, self.m, self.v = found["mean"], found["m"], found["v"]
        self.iteration = int(state["iteration"])
