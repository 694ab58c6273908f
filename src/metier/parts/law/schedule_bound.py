"""Loss curves of any schedule from a bound of convex optimisation (Schaipp et al., arXiv:2501.18965)."""

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from numpy import ndarray

from metier.core import part as parts
from metier.core.convexbound import multipliers, weights
from metier.core.errors import UsageError
from metier.core.part import NonNegative, part

EDGES = np.unique(np.concatenate([np.arange(1, 129), np.geomspace(128, 1e8, 460)]).round())
"""Steps are pooled where the profile of gradient norms is evaluated: one by one up to 128, then 3 % wide."""


@part("law/schedule-bound", paper="arXiv:2501.18965", rows=(11,))
class ScheduleBound:
    """``L = C + Omega``, ``Omega = D²/(2 S) + sum_t w_t G_t²`` of the learning rates up to the step where L was measured.

    S is their sum and ``w_t`` their weights in the last-iterate bound (``metier.core.convexbound``). Columns: ``lr`` the peak
    learning rate, ``steps`` the length of the run, ``step`` the number of updates after which ``loss`` was measured, and
    ``schedule`` the number (from 1) of its entry in the option ``schedules``. So one table may hold whole curves, or final
    losses only (``step`` = ``steps``); with ``steps`` of the order of 1e5, thin the rows out.

    - ``schedules``: any schedules with their options; ``warmup`` and ``tokens_per_step`` as in the runs.
    - ``profile: constant``: one G. ``profile: decaying``: ``G_t = G1 exp(-A1 t) + G2 t^A2 + G``, which the authors' code fits.

    The paper's scale M is not a parameter of its own: D and G here are its ``√M D`` and ``√M G``. Leave out the first tenth of
    a run, which the bound does not describe; final losses of a single length leave C loose. ``metier fit schedule-bound TABLE
    schedules='[constant, {wsd: {decay: 0.1}}]' --at STEPS`` then prints, for a run of STEPS steps, every schedule's best peak
    learning rate ``D/G sqrt(T1/T2)`` and its loss.

    **Planning before anything is trained** needs no fit; D and G cancel. ``metier.core.convexbound`` has ``tuned`` (best factor
    and bound of any schedule), ``transfer(steps, 0.2, 1.0)`` (what the learning rate tuned for a 20 % cooldown is multiplied
    by for linear decay: 1.95, at nearly any length), ``best_cooldown`` (at a fixed learning rate), ``extend_cooldown`` and
    ``extend_plateau`` (go on from a tuned run's plateau to more steps), and ``minimiser`` (the best schedule).

    The bound is for steps ``x - lr g``; that it fits Adam is an observation, and a rate only means something relative to
    its own schedule's peak. It does not know weight averaging, which does part of what a cooldown does.
    """

    ranges = {"lr": (1e-4, 1e-2), "steps": (200.0, 2000.0), "step": (50.0, 2000.0), "schedule": (1.0, 4.99)}
    at_unit = "steps"
    inputs = ("lr", "steps", "step", "schedule")
    output = "loss"

    def __init__(
        self,
        *,
        schedules: tuple[str | dict[str, Any], ...] = ("constant", "wsd", "linear", "cosine"),
        warmup: NonNegative = 0.0,
        tokens_per_step: NonNegative = 0.0,
        profile: Literal["constant", "decaying"] = "constant",
    ) -> None:
        from metier.core.schedule import Schedule

        self.labels = [s if isinstance(s, str) else next(iter(s)) for s in schedules]
        self.schedules = [Schedule(parts.build("schedule", s), warmup=warmup) for s in schedules]
        self.tokens_per_step = tokens_per_step
        self.typical = {"C": 2.5, "D": 0.05, "G": 10.0, "G1": 30.0, "A1": 0.01, "G2": 20.0, "A2": -0.5}
        ranges = {"C": (1e-6, 1e3), "D": (1e-9, 1e6), "G": (1e-9, 1e6), "G1": (1e-9, 1e6), "A1": (1e-6, 10.0)}
        self.bounds = {**ranges, "G2": (1e-9, 1e6), "A2": (-2.0, 1.0)}
        self.names = ("C", "D", "G") if profile == "constant" else tuple(self.bounds)
        self.bounds = {n: self.bounds[n] for n in self.names}
        self._shapes: dict[tuple[int, int], ndarray] = {}
        self._rows: dict[tuple[int, int, int], tuple[float, ndarray]] = {}

    def start(self, x: Mapping[str, ndarray], y: ndarray) -> list[list[float]]:
        """For several shares of C: D and G by least squares with constant norms; a profile starts as parts of that G."""
        from scipy.optimize import nnls

        first, pooled = self._features(x)
        columns = np.stack([first / x["lr"], pooled.sum(1) * x["lr"]], 1)
        found = []
        for share in (0.0, 0.5, 0.8, 0.95, 0.99):
            d, g = np.sqrt(nnls(columns, y - share * y.min())[0] + 1e-12)
            base = [max(share * float(y.min()), 1e-3), float(d), float(g)]
            extra = [[]] if len(self.names) == 3 else [[g, a1, g, a2] for a1 in (0.1, 0.003) for a2 in (-0.5, 0.1)]
            found += [np.clip([*base, *e], *np.array([self.bounds[n] for n in self.names]).T).tolist() for e in extra]
        return found

    def predict(self, theta: ndarray, x: Mapping[str, ndarray]) -> ndarray:
        """Loss in nats per token."""
        first, pooled = self._features(x)
        return theta[0] + theta[1] ** 2 * first / x["lr"] + x["lr"] * (pooled @ self._norms(theta) ** 2)

    def _norms(self, theta: ndarray) -> ndarray:
        """Gradient norms at the pooled steps ``[P]``."""
        if len(theta) == 3:
            return np.full(len(EDGES), theta[2])
        _, _, g, g1, a1, g2, a2 = theta
        return g1 * np.exp(-a1 * EDGES) + g2 * EDGES**a2 + g

    def _features(self, x: Mapping[str, ndarray]) -> tuple[ndarray, ndarray]:
        """``1/(2 S)`` ``[R]`` and the weights pooled over steps ``[R, P]``, for a peak of 1."""
        keys = zip(*(np.asarray(x[n]).astype(int).tolist() for n in ("schedule", "steps", "step")), strict=True)
        rows = [self._row(*key) for key in keys]
        return np.array([r[0] for r in rows]), np.stack([r[1] for r in rows])

    def _row(self, schedule: int, steps: int, step: int) -> tuple[float, ndarray]:
        key = schedule, steps, min(step, steps)
        if key not in self._rows:
            eta = self._shape(schedule, steps)[: key[2]]
            pools = np.searchsorted(EDGES, np.arange(1, len(eta) + 1), side="right") - 1
            pooled = np.bincount(pools, weights(eta), minlength=len(EDGES))
            self._rows[key] = 1 / (2 * float(eta.sum())), pooled
        return self._rows[key]

    def _shape(self, schedule: int, steps: int) -> ndarray:
        if not 1 <= schedule <= len(self.schedules):
            raise UsageError(f"schedule = {schedule}, but there are {len(self.schedules)} schedules", where="law/schedule-bound")
        if (schedule, steps) not in self._shapes:
            at = self.schedules[schedule - 1].at
            self._shapes[schedule, steps] = multipliers(at, steps, tokens_per_step=self.tokens_per_step)
        return self._shapes[schedule, steps]

    def scale(self, x: Mapping[str, ndarray]) -> ndarray:
        """Steps of the run."""
        return x["steps"]

    def optimal(self, theta: ndarray, steps: float) -> dict[str, float]:
        """Best peak learning rate of every schedule for a run of ``steps``, and the loss at its end."""
        found = {}
        for i, label in enumerate(self.labels, start=1):
            first, pooled = self._row(i, int(steps), int(steps))
            low, high = theta[1] ** 2 * first, float(pooled @ self._norms(np.asarray(theta)) ** 2)
            found[f"{i} {label} lr"] = float(np.sqrt(low / high))
            found[f"{i} {label} loss"] = float(theta[0] + 2 * np.sqrt(low * high))
        return found
