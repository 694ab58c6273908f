"""Overoptimization: true reward as a function of the distance from the reference (arXiv:2406.02900)."""

from collections.abc import Mapping
from typing import Literal

import numpy as np
from numpy import ndarray

from metier.core.part import part

LARGEST = 1e9


@part("law/overoptimization", paper="arXiv:2406.02900; the shapes: arXiv:2210.10760", rows=(85,))
class Overoptimization:
    """``R(d) = d (a - b log d)`` with ``d = sqrt(KL)``: the reward that counts first rises with the distance, then falls.

    Columns: ``kl``, the policy's KL to the reference in nats per answer, on its own samples and not the root of it;
    ``reward``, the gold reward or win rate there, of any sign. The peak is at ``d* = exp(a/b - 1)`` with ``R(d*) = b d*``: β and
    the length of a run should leave it near ``KL* = d*²``. With ``b <= 0`` there is none. Compare objectives at equal KL,
    never at equal β.

    ``offset`` adds a constant R0: without it ``R(0) = 0``, so the reward of the reference must be subtracted from the table (for
    a win rate, 1/2). ``shape: quadratic`` is ``d (a - b d)``, which fits sampling of the best of n; its peak is at ``a/(2b)``.

    From runs: train each with ``hooks: [{answers: {prompts: FILE, reward: PART, every: N}}]``, several β, N small in the first
    quarter of the epoch, 256 prompts or more; then, for one run or a folder of them:

        metier fit overoptimization runs/ offset=true kl=answer_kl reward=answer_reward

    One curve is one objective (all its β and checkpoints). The fit is least squares on ``reward``, which is linear in a, b and
    R0; the paper's form divides by d first, and weighs small d more (:meth:`relative`). ``--at KL`` prints the reward there.
    """

    signed = True
    delta = 100.0
    """Width of the Huber loss that leaves plain squares."""
    inputs = ("kl",)
    output = "reward"
    ranges = {"kl": (0.04, 60.0)}
    at_unit = "nats of KL"

    def __init__(self, *, shape: Literal["log", "quadratic"] = "log", offset: bool = False) -> None:
        self.shape, self.offset = shape, offset
        self.names: tuple[str, ...] = ("a", "b", "R0") if offset else ("a", "b")
        self.bounds = {n: (-LARGEST, LARGEST) for n in self.names}
        typical = {"a": 1.0, "b": 0.3 if shape == "log" else 0.1, "R0": 0.5}
        self.typical = {n: typical[n] for n in self.names}

    def columns(self, kl: ndarray) -> ndarray:
        """``[rows, parameters]``: the prediction is this matrix times the parameters."""
        d = np.sqrt(np.asarray(kl, dtype=float))
        bend = d * np.log(d) if self.shape == "log" else d**2
        return np.stack([d, -bend, np.ones_like(d)][: len(self.names)], 1)

    def start(self, x: Mapping[str, ndarray], y: ndarray) -> list[list[float]]:
        """The least-squares solution, and that of the form divided by d."""
        found = np.linalg.lstsq(self.columns(x["kl"]), y, rcond=None)[0]
        return [np.clip(v, -LARGEST, LARGEST).tolist() for v in (found, self.relative(x["kl"], y))]

    def predict(self, theta: ndarray, x: Mapping[str, ndarray]) -> ndarray:
        """Reward."""
        return self.columns(x["kl"]) @ np.asarray(theta, dtype=float)

    def scale(self, x: Mapping[str, ndarray]) -> ndarray:
        """KL."""
        return x["kl"]

    def relative(self, kl: ndarray, reward: ndarray) -> ndarray:
        """Parameters by least squares of ``R/d`` on the columns divided by d, as the paper has it: ``[parameters]``."""
        d = np.sqrt(np.asarray(kl, dtype=float))
        return np.linalg.lstsq(self.columns(kl) / d[:, None], reward / d, rcond=None)[0]

    def derived(self, theta: ndarray) -> dict[str, float]:
        """The peak: ``d*``, ``KL*`` and the reward there; infinite when the curve has none."""
        a, b = (float(v) for v in theta[:2])
        if b <= 0:
            return {"d*": np.inf, "KL*": np.inf, "R(d*)": np.inf}
        d = np.exp(min(a / b - 1, 300.0)) if self.shape == "log" else max(a / (2 * b), 0.0)
        rest = float(theta[2]) if self.offset else 0.0
        return {"d*": float(d), "KL*": float(d**2), "R(d*)": float(b * d if self.shape == "log" else b * d**2) + rest}

    def optimal(self, theta: ndarray, at: float) -> dict[str, float]:
        """The reward at a KL of ``at``."""
        return {"reward": float(self.predict(theta, {"kl": np.array([at])})[0])}
