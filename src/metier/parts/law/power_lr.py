"""Power law of the best learning rate in tokens and batch size (Shen et al., arXiv:2408.13359)."""

from collections.abc import Mapping
from typing import Literal

import numpy as np
from numpy import ndarray

from metier.core.errors import UsageError
from metier.core.part import part


@part("law/power-lr", paper="arXiv:2408.13359", rows=(3,))
class PowerLr:
    """``lr = a beta^p T^b``: the best plateau learning rate of warmup-stable-decay runs of T tokens.

    Columns: ``T`` training tokens, ``beta`` the batch in sequences of 4096 tokens (tokens of a step / 4096), ``lr`` the best
    learning rate found there. ``batch: linear`` sets p = 1 as the paper does; ``batch: free`` fits it too, which is the check
    that the law holds at all (p near 1). The paper's fit over models of 12M, 36M and 121M parameters is ``a = 4.6``, ``b =
    -0.51``; ``schedule/power`` then uses a = 4 with a cap of 0.02, because the value at the end of a long run is too small for
    its start.

    The recipe: train a grid of (lr, beta, T), take the minimum of each cell by a parabola in log lr (:meth:`optima`; it also
    keeps only the three batch sizes of lowest loss for every T), and fit those. ``metier fit power-lr TABLE --at TOKENS``
    prints the rate per unit of batch for a length.
    """

    ranges = {"T": (1e6, 1e12), "beta": (1.0, 1024.0)}
    at_unit = "training tokens"
    inputs = ("T", "beta")
    output = "lr"

    def __init__(self, *, batch: Literal["linear", "free"] = "linear") -> None:
        self.names = ("a", "b") if batch == "linear" else ("a", "b", "p")
        self.bounds = {"a": (1e-6, 1e9), "b": (-3.0, 1.0), "p": (-1.0, 3.0)}
        self.bounds = {n: self.bounds[n] for n in self.names}
        self.typical = {"a": 4.6, "b": -0.51, "p": 1.0}

    def start(self, x: Mapping[str, ndarray], y: ndarray) -> list[list[float]]:
        """The least-squares solution in logarithms, and the paper's."""
        columns = [np.ones(len(y)), np.log(x["T"]), np.log(x["beta"])]
        free = len(self.names) == 3
        wanted = np.log(y) if free else np.log(y) - columns[2]
        found = np.linalg.lstsq(np.stack(columns[: len(self.names)], 1), wanted, rcond=None)[0]
        low, high = np.array([self.bounds[n] for n in self.names]).T
        solved = np.clip([np.exp(np.clip(found[0], -13, 20)), *found[1:]], low, high)
        return [solved.tolist(), [self.typical[n] for n in self.names]]

    def predict(self, theta: ndarray, x: Mapping[str, ndarray]) -> ndarray:
        """The learning rate."""
        return np.exp(self.log_predict(theta, x))

    def log_predict(self, theta: ndarray, x: Mapping[str, ndarray]) -> ndarray:
        """Its logarithm."""
        p = theta[2] if len(theta) == 3 else 1.0
        return np.log(theta[0]) + theta[1] * np.log(x["T"]) + p * np.log(x["beta"])

    def scale(self, x: Mapping[str, ndarray]) -> ndarray:
        """Training tokens."""
        return x["T"]

    def optimal(self, theta: ndarray, tokens: float) -> dict[str, float]:
        """The best learning rate at ``tokens`` for a batch of one 4096-token sequence."""
        one = {"T": np.array([tokens]), "beta": np.array([1.0])}
        return {"lr / beta": float(self.predict(np.asarray(theta), one)[0])}

    @staticmethod
    def best_lr(lrs: ndarray, losses: ndarray) -> tuple[float, float]:
        """The minimum ``(lr, loss)`` of a parabola in log lr through the lowest loss and its neighbours.

        At an end of the grid, where nothing shows the minimum, it is that end. Raises ``UsageError`` for fewer than 3 points.
        """
        order = np.argsort(lrs)
        x, y = np.log(np.asarray(lrs, float)[order]), np.asarray(losses, float)[order]
        if len(x) < 3 or not np.isfinite(y).any():
            raise UsageError(f"{len(x)} learning rates do not make a parabola; at least 3 are needed", where="law/power-lr")
        y = np.where(np.isfinite(y), y, np.inf)
        i = int(np.argmin(y))
        if i in (0, len(x) - 1) or not np.isfinite(y[i - 1 : i + 2]).all():
            return float(np.exp(x[i])), float(y[i])
        c = np.polyfit(x[i - 1 : i + 2] - x[i], y[i - 1 : i + 2], 2)
        step = -c[1] / (2 * c[0]) if c[0] > 0 else 0.0
        return float(np.exp(x[i] + step)), float(np.polyval(c, step))

    @classmethod
    def optima(cls, rows: Mapping[str, ndarray], *, keep: int = 3) -> dict[str, ndarray]:
        """The table to fit, out of one with ``T``, ``beta``, ``lr`` and ``loss`` of every run; ``keep`` batch sizes per T."""
        found: list[tuple[float, float, float, float]] = []
        for t in np.unique(rows["T"]):
            cells = []
            for beta in np.unique(rows["beta"][rows["T"] == t]):
                here = (rows["T"] == t) & (rows["beta"] == beta)
                lr, loss = cls.best_lr(rows["lr"][here], rows["loss"][here])
                cells.append((float(t), float(beta), lr, loss))
            found += sorted(cells, key=lambda c: c[3])[:keep]
        return {n: np.array(v) for n, v in zip(("T", "beta", "lr", "loss"), zip(*found, strict=True), strict=True)}
