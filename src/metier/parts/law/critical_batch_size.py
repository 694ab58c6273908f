"""Critical batch size: steps to a goal as a function of the batch, and what grows with it (Zhang et al., arXiv:2410.21676)."""

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from numpy import ndarray

from metier.core import laws
from metier.core.errors import UsageError
from metier.core.part import Positive, part


@part("law/critical-batch-size", paper="arXiv:2410.21676", rows=(6, 126))
class CriticalBatchSize:
    """``Y(B) = a + b / B^alpha``: steps to a goal at batch size B, and the batch where they stop falling in proportion.

    The critical batch size B* takes ``1 + overhead`` times the steps that linear scaling from a reference batch B_ref promises:
    ``Y(B*) B* = (1 + o) Y(B_ref) B_ref``. With alpha = 1 that is ``B* = o b/a + (1 + o) B_ref``; a = 0 gives infinity, b = 0
    gives ``(1 + o) B_ref``. Columns ``B`` (sequences, or any one unit) and ``steps``, the least over tuned settings; fitted in
    logarithms. ``metier fit critical-batch-size TABLE --at 256`` prints B* for B_ref = 256, which must scale linearly itself.

    - ``alpha: one`` (the paper's choice) or ``free``: with few batch sizes a free exponent overfits; look at its interval.
    - ``level: growth`` is the second regression, ``B* = c size^p``, with columns ``size`` (N or D) and ``B``; ``--at SIZE``.
      :meth:`critical` makes its table out of one with ``size``, ``B`` and ``steps``. Published: 93.2 N^0.47 for D = 20 N (N in
      millions), 621 N^0.087 at fixed data, in sequences of 512 tokens. Convert before comparing; five sizes leave p loose.

    The measurement: schedule ``constant`` with a warmup of a quarter of the reference steps, ``adamw`` with no weight decay and
    beta1 0.95, hooks ``[{ema: {decay: 0.9, start: debias, use: false, log: true}}, ...]``, one for each decay, ``eval_every``
    small. Train B_ref as long as wanted; the lowest averaged loss is the goal. Then, for every B, a sweep of the learning rate,
    beta2 and decay (smaller at large B): a design of ``metier compare`` with ``factor: train.batch``, or runs of their own.
    The first step below the goal (:meth:`reached`), least over settings, is a row. Not tuning again for every B makes B* look
    small, and so do rare evaluations at large B; a goal that a batch never reaches is no row.

    As the authors', the fit minimises squares (``delta``), and gives their numbers on their table; the narrow Huber loss of other
    laws would move B* by up to a few per cent there.
    """

    delta = 100.0
    """Width of the Huber loss that leaves plain squares."""
    inputs: tuple[str, ...] = ("B",)
    output = "steps"
    ranges = {"B": (16.0, 16384.0), "size": (50.0, 5000.0)}

    def __init__(
        self, *, alpha: Literal["one", "free"] = "one", overhead: Positive = 0.2, level: Literal["curve", "growth"] = "curve"
    ) -> None:
        self.overhead, self.level = overhead, level
        curve = level == "curve"
        if not curve:
            self.inputs, self.output = ("size",), "B"
        self.at_unit = "per step as the reference batch" if curve else "size"
        names: tuple[str, ...] = ("a", "b", "alpha") if alpha == "free" else ("a", "b")
        self.names: tuple[str, ...] = names if curve else ("c", "p")
        ranges = {"a": (1e-6, 1e12), "b": (1e-6, 1e18), "alpha": (0.1, 3.0), "c": (1e-9, 1e12), "p": (-2.0, 3.0)}
        self.bounds: Mapping[str, tuple[float, float]] = {n: ranges[n] for n in self.names}
        typical = {"a": 1294.0, "b": 2.83e6, "alpha": 1.0, "c": 93.2, "p": 0.468}
        self.typical = {n: typical[n] for n in self.names}

    def start(self, x: Mapping[str, ndarray], y: ndarray) -> list[list[float]]:
        """Curve: relative least squares of a and b at several exponents. Growth: least squares in logarithms."""
        from scipy.optimize import nnls

        low, high = np.array([self.bounds[n] for n in self.names]).T
        if self.level == "growth":
            p, log_c = np.polyfit(np.log(x["size"]), np.log(y), 1) if np.ptp(x["size"]) else (0.0, np.log(y).mean())
            return [np.clip([np.exp(np.clip(log_c, -20, 25)), p], low, high).tolist()]
        found = []
        for alpha in (1.0, 0.7, 1.4) if len(self.names) == 3 else (1.0,):
            a, b = nnls(np.stack([1 / y, x["B"] ** -alpha / y], 1), np.ones(len(y)))[0]
            a, b = max(a, 1e-3 * y.min()), max(b, 1e-3 * float(np.median(y * x["B"] ** alpha)))
            found.append(np.clip([a, b, alpha][: len(self.names)], low, high).tolist())
        return found

    def predict(self, theta: ndarray, x: Mapping[str, ndarray]) -> ndarray:
        """Steps to the goal, or the critical batch of a size."""
        if self.level == "growth":
            return theta[0] * x["size"] ** theta[1]
        return theta[0] + theta[1] * x["B"] ** -(theta[2] if len(theta) == 3 else 1.0)

    def scale(self, x: Mapping[str, ndarray]) -> ndarray:
        """Batch size, or size."""
        return x[self.inputs[0]]

    def optimal(self, theta: ndarray, at: float) -> dict[str, float]:
        """Curve: B* for the reference batch ``at``, and the steps there. Growth: B* of the size ``at``."""
        theta = np.asarray(theta, dtype=float)
        if self.level == "growth":
            return {"B*": float(theta[0] * at ** theta[1])}
        best = critical(
            float(theta[0]), float(theta[1]), at, overhead=self.overhead, alpha=float(theta[2]) if len(theta) == 3 else 1.0
        )
        return {"B*": best, "steps": float(self.predict(theta, {"B": np.array([best])})[0])}

    def critical(self, table: Mapping[str, ndarray], *, reference: float) -> dict[str, ndarray]:
        """``size``, ``a``, ``b`` and critical batch ``B`` of every size in a table of ``size``, ``B`` and ``steps``.

        Raises ``UsageError`` for ``level: growth`` and for a size with too few batch sizes.
        """
        if self.level == "growth":
            raise UsageError("critical batch sizes come from curves", where="law/critical-batch-size", hint="Leave out level.")
        sizes = np.unique(table["size"])
        rows = []
        for size in sizes:
            here = {n: np.asarray(table[n])[table["size"] == size] for n in ("B", "steps")}
            theta = laws.fit(self, here, bootstrap=0).theta
            rows.append([*theta[:2], self.optimal(theta, reference)["B*"]])
        return {"size": sizes, **dict(zip(("a", "b", "B"), np.array(rows).T, strict=True))}

    @staticmethod
    def reached(steps: ndarray, losses: ndarray, goal: float, *, between: bool = False) -> float:
        """The first evaluated step whose loss is below ``goal``; infinite when there is none.

        ``between``: the crossing of the line from the evaluation before, for evaluations far apart.
        """
        below = np.flatnonzero(np.asarray(losses, float) < goal)
        if not len(below):
            return np.inf
        i = int(below[0])
        if not between or i == 0 or not np.isfinite(losses[i - 1]):
            return float(steps[i])
        part = (losses[i - 1] - goal) / (losses[i - 1] - losses[i])
        return float(steps[i - 1] + part * (steps[i] - steps[i - 1]))


def critical(a: float, b: float, reference: float, *, overhead: float = 0.2, alpha: float = 1.0) -> float:
    """The batch B > ``reference`` with ``(a + b/B^alpha) B = (1 + overhead) (a + b/reference^alpha) reference``; inf if none."""
    wanted = (1 + overhead) * (a * reference + b * reference ** (1 - alpha))
    if alpha == 1:
        return (1 + overhead) * reference + overhead * b / a if a > 0 else (1 + overhead) * reference if b == 0 else np.inf
    if a == 0:
        return (wanted / b) ** (1 / (1 - alpha)) if alpha < 1 else np.inf
    from scipy.optimize import brentq

    def off(x: float) -> float:
        return a * x + b * x ** (1 - alpha) - wanted

    found: Any = brentq(off, reference, wanted / a, xtol=1e-12 * reference)
    return found
