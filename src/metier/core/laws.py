"""Fitting laws to tables of runs: many starts, a Huber loss on logarithms, bootstrap intervals, a check at
held-out scale.

A law is a part with ``names`` and ``bounds`` of its parameters, ``inputs`` (column names) and ``output`` (a
column name), ``start(x, y)`` (rows of parameter values to start from) and ``predict(theta, x)``. It may
define ``log_predict(theta, x)`` where the logarithm is computed more safely, and ``scale(x)`` (what "large"
means; default: the product of the inputs), and ``derived(theta)``, what follows from the parameters.

The fit minimises ``sum_i Huber_delta(log f(theta, x_i) - log y_i)``, or for a law with ``signed = True``, whose output may have
any sign, ``sum_i Huber_delta((f(theta, x_i) - y_i) / rms(y))``. Parameters whose lower bound is positive are fitted by their
logarithm, so that constants of any size are found equally well.
"""

import csv
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy import ndarray

from metier.core.errors import MetierError, UsageError, unknown

Table = Mapping[str, ndarray]


class Law(Protocol):
    """What a law part defines."""

    names: tuple[str, ...]
    bounds: Mapping[str, tuple[float, float]]
    inputs: tuple[str, ...]
    output: str

    def start(self, x: Table, y: ndarray) -> Sequence[Sequence[float]]:
        """Parameter values to start from, one row each."""
        ...

    def predict(self, theta: ndarray, x: Table) -> ndarray:
        """The output for every row."""
        ...


@dataclass(frozen=True)
class Fit:
    """A fitted law. Lists follow ``names`` (parameters) or the rows that were fitted."""

    names: tuple[str, ...]
    values: list[float]
    low: list[float]
    """Lower end of the 95 % bootstrap interval; equal to the value without bootstrap."""
    high: list[float]
    loss: float
    """The minimised sum of Huber losses."""
    rows: int
    observed: list[float]
    predicted: list[float]
    residuals: list[float]
    """``log predicted - log observed``; of a signed law ``predicted - observed`` over the root mean square observed."""
    at_bound: list[str]
    """Parameters that ended on a bound: the table does not determine them."""
    agreeing: float
    """Share of the optimised starts that reached the same loss within 0.1 %."""
    resamples: int
    """Bootstrap resamples behind the intervals."""
    held_out: dict[str, Any] | None = None
    """How the law, fitted without them, predicts the held-out rows."""

    @property
    def theta(self) -> ndarray:
        """The values as an array."""
        return np.array(self.values)

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


# --- the loss ----------------------------------------------------------------------------------------------


def huber(r: ndarray, delta: float) -> ndarray:
    """``r^2 / 2`` for ``|r| <= delta``, else ``delta (|r| - delta / 2)``."""
    size = np.abs(r)
    return np.where(size <= delta, 0.5 * r**2, delta * (size - 0.5 * delta))


class _Problem:
    """Residuals of a law on a table, as a function of unbounded-scale parameters."""

    def __init__(self, law: Law, x: Table, y: ndarray, delta: float) -> None:
        self.law, self.x, self.y, self.delta = law, x, y, delta
        bounds = np.array([law.bounds[n] for n in law.names], dtype=float)
        self.logs = bounds[:, 0] > 0
        self.low, self.high = self.inner(bounds[:, 0]), self.inner(bounds[:, 1])

    def inner(self, theta: ndarray) -> ndarray:
        return np.where(self.logs, np.log(np.where(self.logs, theta, 1.0)), theta)

    def outer(self, u: ndarray) -> ndarray:
        return np.where(self.logs, np.exp(np.where(self.logs, u, 0.0)), u)

    def residuals(self, u: ndarray) -> ndarray:
        with np.errstate(all="ignore"):
            r = deviation(self.law, self.outer(u), self.x, self.y)
        return np.nan_to_num(r, nan=1e3, posinf=1e3, neginf=-1e3)

    def loss(self, u: ndarray) -> float:
        return float(huber(self.residuals(u), self.delta).sum())

    def solve(self, u: ndarray) -> tuple[ndarray, float]:
        """A local minimum near ``u``: least squares with a wide, then with the wanted Huber width, then a
        last polish."""
        from scipy.optimize import least_squares, minimize

        inside = np.clip(u, self.low + 1e-9, self.high - 1e-9)
        for delta in (max(0.1, self.delta), self.delta):
            found = least_squares(
                self.residuals, inside, bounds=(self.low, self.high), loss="huber", f_scale=delta,
                x_scale="jac", max_nfev=200, xtol=1e-12, ftol=1e-12, gtol=1e-12,
            )  # fmt: skip
            inside = np.clip(found.x, self.low + 1e-9, self.high - 1e-9)
        box = list(zip(self.low, self.high, strict=True))
        scaled = minimize(
            lambda v: self.loss(v) / self.delta,
            inside,
            method="L-BFGS-B",
            bounds=box,
            options={"ftol": 1e-14},
        )
        best = min((inside, scaled.x), key=self.loss)
        return best, self.loss(best)


def log_prediction(law: Law, theta: ndarray, x: Table) -> ndarray:
    """``log f(theta, x)`` for every row."""
    if hasattr(law, "log_predict"):
        return law.log_predict(theta, x)  # type: ignore[attr-defined]
    return np.log(law.predict(theta, x))


def signed(law: Law) -> bool:
    """Whether the law's output may have any sign."""
    return bool(getattr(law, "signed", False))


def deviation(law: Law, theta: ndarray, x: Table, y: ndarray) -> ndarray:
    """Prediction against ``y`` for every row, on the scale that is fitted; see :class:`Fit`."""
    if signed(law):
        return (law.predict(theta, x) - y) / _size(y)
    return log_prediction(law, theta, x) - np.log(y)


def _size(y: ndarray) -> float:
    """Root mean square; 1 where everything is 0."""
    return float(np.sqrt(np.mean(np.square(y)))) or 1.0


# --- fitting -----------------------------------------------------------------------------------------------


def fit(
    law: Law, table: Table, *, starts: int = 24, bootstrap: int = 200, seed: int = 0, delta: float | None = None,
    holdout: float | str | None = None,
) -> Fit:  # fmt: skip
    """Fit ``law`` to the columns of ``table``.

    ``delta`` is the width of the Huber loss; when not given, the law's own (``law.delta``) or 1e-3. Of the law's own starts the
    ``starts`` with the lowest loss are optimised. Intervals are percentiles over ``bootstrap`` resamples of the rows, each
    refitted from the best solution and from the start. ``holdout`` is the share of rows of the largest scale, or a condition
    such as ``N>=1e9``: the law is also fitted without these rows and asked to predict them.

    Raises ``UsageError`` for missing columns, values that are not positive and finite, or too few rows.
    """
    delta = float(getattr(law, "delta", 1e-3) if delta is None else delta)
    x, y = columns(law, table)
    best, losses = _best(_Problem(law, x, y, delta), law.start(x, y), starts)
    problem = _Problem(law, x, y, delta)
    theta = problem.outer(best)
    samples = _bootstrap(law, x, y, delta, best, bootstrap, seed)
    low, high = np.percentile(samples, [2.5, 97.5], axis=0) if len(samples) else (theta, theta)
    residuals = problem.residuals(best)
    near = 1e-6 * np.maximum(1.0, problem.high - problem.low)
    stuck = (best - problem.low < near) | (problem.high - best < near)
    return Fit(
        tuple(law.names), theta.tolist(), low.tolist(), high.tolist(), min(losses), len(y), y.tolist(),
        (y + _size(y) * residuals if signed(law) else y * np.exp(residuals)).tolist(), residuals.tolist(),
        [n for n, s in zip(law.names, stuck, strict=True) if s],
        float(np.mean(np.array(losses) <= min(losses) * 1.001 + 1e-12)), len(samples),
        None if holdout is None else _held_out(law, table, starts, delta, holdout),
    )  # fmt: skip


def _best(problem: _Problem, starts: Sequence[Sequence[float]], number: int) -> tuple[ndarray, list[float]]:
    begun = [problem.inner(np.asarray(s, dtype=float)) for s in starts]
    begun.sort(key=problem.loss)
    solved = [problem.solve(u) for u in begun[:number]]
    return min(solved, key=lambda s: s[1])[0], [loss for _, loss in solved]


def _bootstrap(law: Law, x: Table, y: ndarray, delta: float, best: ndarray, number: int, seed: int) -> ndarray:
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(number):
        rows = rng.integers(len(y), size=len(y))
        problem = _Problem(law, {n: v[rows] for n, v in x.items()}, y[rows], delta)
        found.append(problem.outer(problem.solve(best)[0]))
    return np.array(found)


def _held_out(law: Law, table: Table, starts: int, delta: float, holdout: float | str) -> dict[str, Any]:
    out = held_out_rows(law, table, holdout)
    inside = fit(law, {n: v[~out] for n, v in table.items()}, starts=starts, bootstrap=0, delta=delta)
    x, y = columns(law, {n: v[out] for n, v in table.items()}, least=1)
    predicted = law.predict(inside.theta, x) if signed(law) else np.exp(log_prediction(law, inside.theta, x))
    relative = (predicted - y) / _size(y) if signed(law) else predicted / y - 1
    return {
        "rows": len(y), "rule": str(holdout), "mean_relative_error": float(np.abs(relative).mean()),
        "worst_relative_error": float(np.abs(relative).max()), "bias": float(relative.mean()),
        "observed": y.tolist(), "predicted": predicted.tolist(), "values": inside.values,
    }  # fmt: skip


def held_out_rows(law: Law, table: Table, holdout: float | str) -> ndarray:
    """Which rows are held out: ``[rows]`` bool."""
    if isinstance(holdout, str) and (found := re.fullmatch(r"\s*(\w+)\s*(>=|<=|>|<)\s*([-+.\deE]+)\s*", holdout)):
        name, sign, number = found.groups()
        if name not in table:
            raise unknown("column", name, table, where="holdout")
        compare = {">=": np.greater_equal, "<=": np.less_equal, ">": np.greater, "<": np.less}[sign]
        out = compare(table[name], float(number))
    else:
        out = _largest(law, table, holdout)
    if not 0 < out.sum() < len(out):
        raise UsageError(f"holdout {holdout} takes {int(out.sum())} of {len(out)} rows", where="holdout")
    return out


def _largest(law: Law, table: Table, share: float | str) -> ndarray:
    try:
        fraction = float(share)
    except ValueError:
        raise UsageError(f"holdout {share!r} is neither a share nor a condition such as N>=1e9", where="holdout") from None
    if not 0 < fraction < 1:
        raise UsageError(f"holdout {share} must lie between 0 and 1", where="holdout")
    x = {n: table[n] for n in law.inputs}
    scale = law.scale(x) if hasattr(law, "scale") else np.prod([x[n] for n in law.inputs], axis=0)  # type: ignore[attr-defined]
    return scale > np.quantile(scale, 1 - fraction)


# --- tables ------------------------------------------------------------------------------------------------


def columns(law: Law, table: Table, *, least: int | None = None) -> tuple[dict[str, ndarray], ndarray]:
    """The law's inputs and output as float64 columns. Raises ``UsageError`` for what cannot be fitted."""
    for name in (*law.inputs, law.output):
        if name not in table:
            raise unknown("column", name, table, more=f"The law needs {', '.join(law.inputs)} and {law.output}.")
        free = name == law.output and signed(law)
        bad = np.flatnonzero(~(np.isfinite(table[name]) & (free | (table[name] > 0))))
        if len(bad):
            wanted = "finite" if free else "positive"
            raise UsageError(f"{name} = {table[name][bad[0]]}: values must be {wanted}", where=f"row {bad[0] + 1}")
    y = np.asarray(table[law.output], dtype=float)
    needed = len(law.names) + 1 if least is None else least
    if len(y) < needed:
        raise UsageError(f"{len(y)} rows cannot determine {len(law.names)} parameters; at least {needed} are needed")
    return {n: np.asarray(table[n], dtype=float) for n in law.inputs}, y


def read_table(path: Path, names: Mapping[str, str] | None = None, wanted: Sequence[str] = ()) -> dict[str, ndarray]:
    """Numeric columns of a ``.csv`` (with header) or ``.jsonl`` file; others are left out.

    ``names`` renames: ``{expected: the file's}``. Of a folder (a run, or one that holds runs) the steps are read that logged all
    of ``wanted``. Raises ``UsageError`` when the file cannot be read.
    """
    rows = _logged(path, [(names or {}).get(n, n) for n in wanted]) if path.is_dir() else _rows(path)
    if not rows or not all(isinstance(r, Mapping) for r in rows):
        raise UsageError(f"{path.name} holds no rows")
    found = {str(n): v for n in rows[0] if (v := _numbers([r.get(n) for r in rows])) is not None}
    for expected, given in (names or {}).items():
        if given not in found:
            raise unknown("column", given, found, where=path.name)
        found[expected] = found[given]
    if not found:
        raise MetierError(f"{path.name} has no numeric column")
    return found


def _logged(folder: Path, wanted: Sequence[str]) -> list[dict[str, Any]]:
    """Steps of all runs below a folder that logged every wanted name."""
    from metier.core import log

    runs = sorted(p.parent for p in folder.rglob(log.NAME))
    if not runs:
        raise UsageError(f"{folder} holds no runs", hint="Give a .csv or .jsonl file, a run's folder, or a folder of runs.")
    steps = [e for run in runs for e in log.read(run) if e["event"] == "step"]
    for name in wanted:
        if not any(name in e for e in steps):
            raise unknown("metric", name, sorted({k for e in steps for k in e}), where=str(folder),
                          more="our_column=metric renames.")  # fmt: skip
    kept = [e for e in steps if all(n in e for n in wanted)]
    if not kept:
        raise UsageError(f"no step of {folder} logged all of {', '.join(wanted)}")
    return [{k: e[k] for k in set.intersection(*(set(e) for e in kept))} for e in kept]


def _rows(path: Path) -> list[Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as e:
        raise UsageError(f"cannot read {path}: {e.strerror}") from None
    try:
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        if path.suffix == ".csv":
            return list(csv.DictReader(text.splitlines()))
    except ValueError as e:
        raise UsageError(f"cannot read {path}: {e}") from None
    raise UsageError(f"{path.name} is neither .csv nor .jsonl")


def _numbers(values: list[Any]) -> ndarray | None:
    try:
        return np.array([float(v) for v in values])
    except (TypeError, ValueError):
        return None


def plot(result: Fit, *, title: str = "", width: int = 480) -> str:
    """Observed against predicted as SVG; held-out rows as rings. Axes are logarithmic where all values are positive."""
    held = result.held_out or {"observed": [], "predicted": []}
    values = np.array([*result.observed, *result.predicted, *held["observed"], *held["predicted"]])
    logs = bool((values > 0).all())
    both = np.log10(values) if logs else values
    low, high = float(both.min()), float(both.max())
    margin, span = 50, max(high - low, 1e-9)

    def at(value: float) -> float:
        return margin + ((np.log10(value) if logs else value) - low) / span * (width - 2 * margin)

    def dots(observed: list[float], predicted: list[float], style: str) -> str:
        return "".join(
            f'<circle cx="{at(o):.1f}" cy="{width - at(p):.1f}" r="3" {style}/>' for o, p in zip(observed, predicted, strict=True)
        )

    ticks = "".join(
        f'<text x="{at(v):.0f}" y="{width - margin + 18}" text-anchor="middle">{v:.3g}</text>'
        f'<text x="{margin - 6}" y="{width - at(v) + 4:.0f}" text-anchor="end">{v:.3g}</text>'
        for v in (10 ** np.linspace(low, high, 4) if logs else np.linspace(low, high, 4))
    )
    a, b = margin, width - margin
    fitted = dots(result.observed, result.predicted, 'fill="#2563eb"')
    rings = dots(held["observed"], held["predicted"], 'fill="none" stroke="#dc2626" stroke-width="1.5"')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{width}"'
        ' font-family="sans-serif" font-size="11"><rect width="100%" height="100%" fill="white"/>'
        f'<rect x="{a}" y="{a}" width="{b - a}" height="{b - a}" fill="none" stroke="#999"/>'
        f'<line x1="{a}" y1="{b}" x2="{b}" y2="{a}" stroke="#999" stroke-dasharray="4"/>{ticks}'
        f"{fitted}{rings}"
        f'<text x="{width / 2}" y="{width - 10}" text-anchor="middle">observed</text>'
        f'<text x="14" y="{width / 2}" text-anchor="middle"'
        f' transform="rotate(-90 14 {width / 2})">predicted</text>'
        f'<text x="{width / 2}" y="26" text-anchor="middle" font-size="13">{escape(title)}</text></svg>\n'
    )
