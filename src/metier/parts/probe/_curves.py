"""Figures read off accuracy curves of a preference set (arXiv:2409.09603): over its size, and over labels flipped in it.

Accuracies are of pairs, 1/2 is chance; sizes are interpolated in their logarithm, flip rates as they are.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

CHANCE = 0.5
Floats = Sequence[float] | np.ndarray
Measured = Callable[[np.ndarray, np.ndarray], float]
"""``(rows [n], signs [n]) -> accuracy`` of a model trained on those rows, a sign of -1 exchanging the answers of a pair."""


def saturation(n: Floats, accuracy: Floats, share: float = 0.95) -> float | None:
    """Effective size ``n_95``: the least n with ``A(n) ≥ ½ + share (A(N) - ½)``, N the largest.

    Between the sizes measured log n is interpolated; the smallest of them when it already suffices (the true value is then
    at most that). ``None`` when the whole set does not beat chance.
    """
    x, y = np.log(np.asarray(n, float)), np.asarray(accuracy, float)
    if y[-1] <= CHANCE:
        return None
    wanted = CHANCE + share * (y[-1] - CHANCE)
    i = int(np.argmax(y >= wanted))
    if i == 0:
        return float(n[0])
    return math.exp(x[i - 1] + (wanted - y[i - 1]) / (y[i] - y[i - 1]) * (x[i] - x[i - 1]))


def equivalent_size(n1: Floats, accuracy1: Floats, n2: Floats, accuracy2: Floats, n: float) -> float:
    """``n_eq(D1 | D2, n)``: how many pairs of D1 are worth n pairs of D2, ``A1(n_eq) = A2(n)`` on one benchmark.

    Where noise makes a curve cross the value several times, the crossing nearest to n. Infinite when D1 never gets there
    within the sizes measured, 0 when its smallest one does better.
    """
    x, y = np.log(np.asarray(n1, float)), np.asarray(accuracy1, float)
    at = math.log(n)
    wanted = float(np.interp(at, np.log(np.asarray(n2, float)), accuracy2))
    if math.isclose(wanted, float(np.interp(at, x, y)), rel_tol=1e-12) and x[0] <= at <= x[-1]:
        return float(n)
    slope = np.diff(y)
    inside = (np.minimum(y[:-1], y[1:]) <= wanted) & (wanted <= np.maximum(y[:-1], y[1:])) & (slope != 0)
    if not inside.any():
        return math.inf if wanted > y.max() else 0.0
    found = x[:-1][inside] + (wanted - y[:-1][inside]) / slope[inside] * np.diff(x)[inside]
    return math.exp(found[int(np.argmin(np.abs(found - at)))])


def invariance(q: Floats, accuracy: Floats, until: float = 0.4) -> tuple[float | None, float | None]:
    """``(area, q_half)`` of the gain that is left, ``g(q) = [A(q) - ½] / [A(0) - ½]``.

    ``area``: mean of g over q in [0, until], by trapezoids: 1 for a set that flips do not hurt. ``q_half``: least rate with
    ``g ≤ ½``; ``None`` when none was measured. Both ``None`` when the set as it is does not beat chance.
    """
    q, g = np.asarray(q, float), np.asarray(accuracy, float) - CHANCE
    if g[0] <= 0:
        return None, None
    g = g / g[0]
    ends = np.append(q[q < until], until)
    area = float(np.trapezoid(np.interp(ends, q, g), ends)) / until
    below = np.flatnonzero(g <= 0.5)
    if not len(below):
        return area, None
    i = int(below[0])
    return area, float(q[i - 1] + (g[i - 1] - 0.5) / (g[i - 1] - g[i]) * (q[i] - q[i - 1]))


def intrinsic_noise(q: Floats, accuracy: Floats, clean_q: Floats, clean_accuracy: Floats) -> float:
    """Share e of labels that are wrong already, read off the curve of a clean set of the same size on the same benchmark.

    A set of noise e flipped at rate q has noise ``e + q - 2eq``: at q = 0 its curve lies e to the right of the clean one, and
    the distance shrinks to 0 at q = ½. Least squares over all q, e in [0, ½] to 0.001.
    """
    q, a = np.asarray(q, float), np.asarray(accuracy, float)
    candidates = np.linspace(0, 0.5, 501)
    noise = candidates[:, None] + q - 2 * candidates[:, None] * q
    error = ((np.interp(noise, clean_q, clean_accuracy) - a) ** 2).sum(1)
    return float(candidates[int(np.argmin(error))])


def flips(number: int, q: float, seed: int) -> np.ndarray:
    """``[number]`` signs, -1 for each label flipped, independently with probability q: applied twice they change nothing.

    With one seed what is flipped at a lower rate is flipped at a higher one too. Not the generator of :func:`subset`.
    """
    return np.where(np.random.default_rng([seed, 1]).random(number) < q, -1.0, 1.0)


def subset(same: Floats, share: float, seed: int) -> np.ndarray:
    """Rows of a random ``share`` of the distinct pairs, at least one; ``same [N]`` numbers the pairs, copies alike.

    With one seed smaller shares are parts of larger ones.
    """
    names, place = np.unique(np.asarray(same), return_inverse=True)
    rank = np.argsort(np.random.default_rng([seed, 2]).permutation(len(names)))
    return np.flatnonzero(rank[place] < max(1, round(share * len(names))))
