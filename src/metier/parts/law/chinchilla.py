"""Chinchilla: loss as a function of parameters and tokens (arXiv:2203.15556, section 3.3 and appendix D)."""

from collections.abc import Mapping
from itertools import product

import numpy as np
from numpy import ndarray

from metier.core.part import part


@part("law/chinchilla", paper="arXiv:2203.15556", rows=(29,))
class Chinchilla:
    """``L(N, D) = E + A / N^alpha + B / D^beta``: irreducible loss, and what too few parameters or tokens
    add.

    Columns: ``N`` parameters, ``D`` training tokens, ``loss``. Predictions are computed as ``log L =
    logsumexp(log E, log A - alpha log N, log B - beta log D)``; the paper's width of the Huber loss is 1e-3.
    """

    names = ("E", "A", "B", "alpha", "beta")
    bounds = {
        "E": (1e-6, 1e3),
        "A": (1e-6, 1e15),
        "B": (1e-6, 1e15),
        "alpha": (1e-3, 3.0),
        "beta": (1e-3, 3.0),
    }
    inputs = ("N", "D")
    output = "loss"

    def start(self, x: Mapping[str, ndarray], y: ndarray) -> list[list[float]]:
        """A grid over exponents and irreducible loss; ``A`` and ``B`` share what is left at the middle of the
        table."""
        n, d = np.median(x["N"]), np.median(x["D"])
        grid = []
        for share, alpha, beta, split in product((0.2, 0.6, 0.95), (0.1, 0.3, 0.6), (0.1, 0.3, 0.6), (0.3, 0.7)):
            least = share * y.min()
            rest = max(float(np.median(y)) - least, 1e-3)
            grid.append([least, split * rest * n**alpha, (1 - split) * rest * d**beta, alpha, beta])
        return grid

    def predict(self, theta: ndarray, x: Mapping[str, ndarray]) -> ndarray:
        """Loss in nats per token."""
        return np.exp(self.log_predict(theta, x))

    def log_predict(self, theta: ndarray, x: Mapping[str, ndarray]) -> ndarray:
        """Logarithm of the loss."""
        e, a, b, alpha, beta = theta
        terms = [
            np.full(len(x["N"]), np.log(e)),
            np.log(a) - alpha * np.log(x["N"]),
            np.log(b) - beta * np.log(x["D"]),
        ]
        return np.logaddexp.reduce(terms, axis=0)

    def scale(self, x: Mapping[str, ndarray]) -> ndarray:
        """Training FLOPs, ``6 N D``."""
        return 6 * x["N"] * x["D"]

    def optimal(self, theta: ndarray, flops: float) -> dict[str, float]:
        """Parameters and tokens of least loss at ``flops = 6 N D`` (equation 4), and that loss.

        ``N = G (C/6)^a``, ``D = (C/6)^b / G`` with ``a = beta / (alpha + beta)``, ``b = alpha / (alpha +
        beta)`` and ``G = (alpha A / (beta B))^(1 / (alpha + beta))``.
        """
        _, a, b, alpha, beta = (float(v) for v in theta)
        g = (alpha * a / (beta * b)) ** (1 / (alpha + beta))
        n = g * (flops / 6) ** (beta / (alpha + beta))
        d = flops / 6 / n
        loss = self.predict(np.asarray(theta), {"N": np.array([n]), "D": np.array([d])})
        return {"N": n, "D": d, "loss": float(loss[0])}
