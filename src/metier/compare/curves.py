"""Curves of several seeds as one line with a band."""

import math
from collections.abc import Sequence

import numpy as np

from metier.compare import stats
from metier.compare.plots import Series
from metier.compare.results import Arm, ComparisonResult, Curve, RunResult

POINTS = 160
"""Most points of a drawn line."""
MOST = 7
"""Arms beside the control that eyes can still tell apart."""
X = {"tokens": "tokens seen", "seconds": "training time (s)"}


def drawn(result: ComparisonResult) -> list[Arm]:
    """The arms in the charts: the control, then the others, of many only the best ``MOST``."""
    others = result.challengers
    if len(others) > MOST:
        sign = 1 if result.lower_is_better else -1
        means = {a.name: stats.summary(result, a.name).mean for a in others}
        ranked = sorted(others, key=lambda a: math.inf if (m := means[a.name]) is None else sign * m)
        kept = {a.name for a in ranked[:MOST]}
        others = [a for a in others if a.name in kept]
    return [result.control, *others]


def styles(result: ComparisonResult) -> dict[str, str]:
    """CSS class of each drawn arm: the control is ``s0``, the others ``s1`` … ``s7`` in order."""
    return {a.name: f"s{i}" for i, a in enumerate(drawn(result))}


def has_evals(result: ComparisonResult) -> bool:
    """Whether evaluations were frequent enough to draw a curve of the metric."""
    curves = [r.eval_curve for r in result.runs if r.trial is None and r.eval_curve]
    return any(len(c) >= 4 for c in curves)


def by_arm(result: ComparisonResult, x: str, *, evals: bool) -> list[Series]:
    """One series per arm over ``tokens`` or ``seconds``: mean of the seeds, band from lowest to highest."""
    style, found = styles(result), []
    for arm in drawn(result):
        curves = [c for r in _shown(result, arm.name) if (c := _pick(r, evals)) is not None and len(c)]
        if curves:
            found.append(_merge(curves, x, arm.label, style[arm.name], smooth=not evals))
    return [s for s in found if len(s.x)]


def _shown(result: ComparisonResult, arm: str) -> list[RunResult]:
    """The runs that finished; failed ones where no other is left, to show what happened."""
    finals = result.finals(arm)
    return [r for r in finals if not r.failed] or finals


def _pick(run: RunResult, evals: bool) -> Curve | None:
    if not evals or run.eval_curve is None:
        return None if evals else run.curve
    return timed(run.eval_curve, run.curve)


def timed(evals: Curve, curve: Curve) -> Curve:
    """Evaluations with the training time of their step where they carry none of their own."""
    if any(evals.seconds) or not len(curve):
        return evals
    seconds = np.interp(evals.step, curve.step, curve.seconds).tolist()
    return evals.model_copy(update={"seconds": seconds})


def _merge(curves: Sequence[Curve], x: str, label: str, style: str, smooth: bool) -> Series:
    columns = [(np.asarray(getattr(c, x), float), smoothed(c.value) if smooth else np.asarray(c.value)) for c in curves]
    if not smooth and len(columns[0][0]) <= POINTS and all(np.array_equal(columns[0][0], c[0]) for c in columns):
        grid = columns[0][0]
    else:
        # Seeds differ in speed: the line ends where the fastest does, so that it is a mean of all throughout.
        ends = max(c[0][0] for c in columns), min(c[0][-1] for c in columns)
        grid = np.linspace(*ends, min(POINTS, max(len(c) for c in curves))) if ends[1] > ends[0] else columns[0][0][:1]
    values = np.stack([np.interp(grid, xs, ys) for xs, ys in columns])
    several = len(curves) > 1
    return Series(
        label, style, grid.tolist(), values.mean(0).tolist(), values.min(0).tolist() if several else (),
        values.max(0).tolist() if several else (), dots=not smooth and len(grid) <= 12,
    )  # fmt: skip


def smoothed(values: Sequence[float]) -> np.ndarray:
    """Centred running mean over a twentieth of the curve; what is not finite stays so."""
    y = np.asarray(values, float)
    half = len(y) // 40
    if half < 1:
        return y
    # Towards the ends the window shrinks evenly: a one-sided one would bend the curve.
    sums = np.concatenate([[0.0], np.cumsum(y)])
    reach = np.minimum(half, np.minimum(np.arange(len(y)), np.arange(len(y))[::-1]))
    at = np.arange(len(y))
    mean = (sums[at + reach + 1] - sums[at - reach]) / (2 * reach + 1)
    return mean if math.isfinite(sums[-1]) else y


def sampled(series: Sequence[Series], rows: int = 8) -> list[list[float]]:
    """The same numbers as a table: x, then every line's value there."""
    if not series:
        return []
    low, high = max(min(s.x) for s in series), max(max(s.x) for s in series)
    grid = np.linspace(low, high, rows)
    return [[float(g), *(_value_at(s, float(g)) for s in series)] for g in grid]


def _value_at(s: Series, x: float) -> float:
    return math.nan if x > max(s.x) * (1 + 1e-9) else float(np.interp(x, s.x, s.y))
