"""Surge: the best learning rate of sign-like optimizers rises and falls with the batch (Li et al., arXiv:2405.14578)."""

from collections.abc import Mapping
from typing import Literal

import numpy as np
from numpy import ndarray

from metier.core.part import part


@part("law/surge", paper="arXiv:2405.14578", rows=(126,))
class Surge:
    """``lr(B) = lr_max / (½ (√(B_noise/B) + √(B/B_noise)))``: the best learning rate of Adam-like optimizers at batch size B.

    Far below B_noise that is the square-root rule; the peak is at B_noise, and both sides are mirror images in log B. ``rule:
    sgd`` is the law of SGD, ``lr_max / (1 + B_noise/B)``: linear, then level. Columns ``B`` and ``lr``, the best constant
    learning rate to reach one loss from one common checkpoint; fitted in log lr. ``metier fit surge TABLE --at B`` prints the
    rate for a batch. Compare at equal loss, not equal steps; do not decay (the optimum would be the schedule's); set weight
    decay apart from lr; take a grid of factors √2 with three points on either side. When all B lie on one side of the peak
    only ``lr_max √(1/B_noise)`` (or ``√B_noise``) is determined, which the intervals show. B_noise grows during training.

    **Where it comes from.** Loss quadratic with gradient g and Hessian H, minibatch gradient ``G_i ~ N(g_i, σ_i²/B)``
    independent over i, update ``-lr sign(G)``. :meth:`sign_mean`, :meth:`decrease` and :meth:`best` are exact there;
    :meth:`small_batch` gives ``(lr_max, B_noise)`` of the law, which takes erf as linear: it holds while all ``B (g/σ)²`` are
    small. Beyond, the exact rate does not fall to 0 but to that of the full gradient's sign. A diagonal H has no fall at all
    (B_noise infinite). Momentum changes the constants. At the best rates steps S and examples E = B S obey ``(S/S_min - 1)
    (E/E_min - 1) = 1``, that is ``S = S_min + E_min / B`` (:meth:`hyperbola`): fit it with ``law/critical-batch-size``, whose
    a is S_min and b is E_min; ``b/a`` is a second estimate of B_noise.
    """

    delta = 100.0
    """Width of the Huber loss that leaves plain squares, as the paper fits."""
    names = ("lr_max", "B_noise")
    bounds = {"lr_max": (1e-9, 1e3), "B_noise": (1e-3, 1e9)}
    typical = {"lr_max": 3e-3, "B_noise": 64.0}
    ranges = {"B": (1.0, 1024.0)}
    inputs = ("B",)
    output = "lr"
    at_unit = "per step"

    def __init__(self, *, rule: Literal["sign", "sgd"] = "sign") -> None:
        self.rule = rule

    def start(self, x: Mapping[str, ndarray], y: ndarray) -> list[list[float]]:
        """A grid of B_noise reaching past the table on both sides, each with the mean log lr_max it implies."""
        low, high = np.log(x["B"].min()), np.log(x["B"].max())
        grid = np.exp(np.linspace(low - 3, high + 3, 16))
        return [[float(np.exp(np.mean(np.log(y) - self._shape(n, x["B"])))), float(n)] for n in grid]

    def predict(self, theta: ndarray, x: Mapping[str, ndarray]) -> ndarray:
        """The best learning rate."""
        return np.exp(self.log_predict(theta, x))

    def log_predict(self, theta: ndarray, x: Mapping[str, ndarray]) -> ndarray:
        """Its logarithm."""
        return np.log(theta[0]) + self._shape(theta[1], x["B"])

    def _shape(self, noise: float, batch: ndarray) -> ndarray:
        """``log lr / lr_max``."""
        off = np.log(batch) - np.log(noise)
        return -np.logaddexp(0, -off) if self.rule == "sgd" else np.log(2) - np.logaddexp(off / 2, -off / 2)

    def scale(self, x: Mapping[str, ndarray]) -> ndarray:
        """Batch size."""
        return x["B"]

    def optimal(self, theta: ndarray, batch: float) -> dict[str, float]:
        """The best learning rate at a batch size, and what it is of the largest."""
        lr = float(self.predict(np.asarray(theta), {"B": np.array([float(batch)])})[0])
        return {"lr": lr, "of lr_max": lr / float(theta[0])}

    @staticmethod
    def sign_mean(g: ndarray, sigma: ndarray, batch: float) -> ndarray:
        """``E sign(G_i) = erf(√(B/2) g_i/σ_i)`` ``[n]`` for ``G_i ~ N(g_i, σ_i²/B)``; ``batch`` may be infinite."""
        from scipy.special import erf

        return np.sign(g) if np.isinf(batch) else erf(np.sqrt(batch / 2) * g / sigma)

    @classmethod
    def decrease(cls, g: ndarray, sigma: ndarray, hessian: ndarray, batch: float, lr: float) -> float:
        """Expected fall of the loss in one step: ``lr g·u - lr²/2 (uᵀHu + Σ H_ii (1 - u_i²))``; ``hessian [n, n]``."""
        u = cls.sign_mean(g, sigma, batch)
        return float(lr * g @ u - lr**2 / 2 * _curvature(u, hessian))

    @classmethod
    def best(cls, g: ndarray, sigma: ndarray, hessian: ndarray, batch: float) -> float:
        """The rate of largest expected fall, ``g·u / (Σ H_ii + Σ_{i≠j} H_ij u_i u_j)``.

        The fall there is half of rate times ``g·u``. Infinite when the curvature is not positive.
        """
        u = cls.sign_mean(g, sigma, batch)
        curvature = _curvature(u, hessian)
        return float(g @ u / curvature) if curvature > 0 else np.inf

    @staticmethod
    def best_sgd(g: ndarray, sigma: ndarray, hessian: ndarray, batch: float) -> float:
        """The same for the update ``-lr G``: ``|g|² / (gᵀHg + Σ H_ii σ_i² / B)``."""
        return float(g @ g / (g @ hessian @ g + np.diag(hessian) @ sigma**2 / batch))

    @staticmethod
    def small_batch(g: ndarray, sigma: ndarray, hessian: ndarray) -> tuple[float, float]:
        """``(lr_max, B_noise)`` of the law: with ``x = g/σ``, ``T = Σ H_ii`` and ``Q = Σ_{i≠j} H_ij x_i x_j``,
        ``lr_max = Σ g_i x_i / (2 √(T Q))`` and ``B_noise = π T / (2 Q)``; both infinite when Q is not positive (no fall)."""
        x, diagonal = g / sigma, np.diag(hessian)
        t, q = float(diagonal.sum()), float(x @ hessian @ x - diagonal @ x**2)
        # A diagonal Hessian leaves rounding errors in q.
        if q <= 1e-12 * float(np.abs(hessian).sum() * (x**2).max()):
            return np.inf, np.inf
        return float(g @ x) / (2 * np.sqrt(t * q)), np.pi * t / (2 * q)

    @staticmethod
    def hyperbola(batch: ndarray, s_min: float, e_min: float) -> tuple[ndarray, ndarray]:
        """Steps ``S = S_min + E_min/B`` and examples ``E = B S`` at the best rates; balanced at ``B = E_min/S_min``."""
        steps = s_min + e_min / np.asarray(batch, dtype=float)
        return steps, steps * batch


def _curvature(u: ndarray, hessian: ndarray) -> float:
    """``E sign(G)ᵀ H sign(G)`` for independent signs of mean u."""
    return float(u @ hessian @ u + np.diag(hessian) @ (1 - u**2))
