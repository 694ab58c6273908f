"""Preferences that no reward explains, and games over answers: cycles, winners, Bradley-Terry residuals, Nash policies.

``p [n, n]`` is a preference matrix: ``p[i, j]`` is the probability that answer i is preferred to j, ``p[j, i] = 1 - p[i, j]``, ½
on the diagonal. Policies are probabilities ``[n]``. Arguments are checked by :func:`matrix`; everything is float64 numpy.

    cycles(p), winner(p), smith_set(p), representable(p)     # what majorities say
    bt_fit(wins), hodge_residual(p)                          # what a Bradley-Terry reward can and cannot explain
    nash(p)                                                  # max_π min_π' πᵀpπ', exactly
    regularised(p, mu, tau)                                  # its unique version with KL to μ, exactly
    nash_md(p, mu, tau, steps), self_play(p, mu, steps, eta) # iterates
    cycle_probability(n, m, draws, seed)                     # m voters with random rankings of n answers
"""

import math
from collections.abc import Sequence
from itertools import combinations

import numpy as np
from scipy.optimize import linprog
from scipy.sparse.csgraph import connected_components

from metier.core.errors import UsageError
from metier.core.preferencefit import logistic

Array = np.ndarray


def matrix(p: Array | Sequence[Sequence[float]]) -> Array:
    """``p`` as float64, checked. Raises ``UsageError`` when it is not a preference matrix."""
    a = np.asarray(p, float)
    if a.ndim != 2 or a.shape[0] != a.shape[1] or len(a) < 2:
        raise UsageError(f"a preference matrix is square with two or more rows, not of shape {a.shape}")
    if not ((a >= 0) & (a <= 1)).all():
        raise UsageError("a preference matrix holds probabilities")
    if np.abs(a + a.T - 1).max() > 1e-6:
        raise UsageError("p[i, j] + p[j, i] must be 1 (and p[i, i] = 1/2)", hint="Average a judge over both orders.")
    return a


def from_wins(wins: Array | Sequence[Sequence[float]], *, prior: float = 0.0) -> Array:
    """Preference matrix of counts: ``wins[i, j]`` comparisons of i with j were won by i; pairs never compared are even.

    ``prior``: so many wins are added to both sides, which keeps few comparisons from being certain.
    """
    w = np.asarray(wins, float) + prior
    if w.ndim != 2 or w.shape[0] != w.shape[1] or not (np.isfinite(w).all() and (w >= 0).all()):
        raise UsageError(f"wins are a square table of counts, not of shape {w.shape} or with negative entries")
    total = w + w.T
    p = np.where(total > 0, w / np.where(total > 0, total, 1.0), 0.5)
    np.fill_diagonal(p, 0.5)
    return p


# --- majorities ------------------------------------------------------------------------------------------------------


def _beats(p: Array) -> Array:
    return matrix(p) > 0.5 + 1e-12


def cycles(p: Array) -> list[tuple[int, int, int]]:
    """Every cycle of three, ``i`` beats ``j`` beats ``k`` beats ``i``, smallest index first. Without ties there is a cycle of any
    length only if there is one of three; with ties ask :func:`has_cycle`."""
    b = _beats(p)
    found = []
    for i, j, k in combinations(range(len(b)), 3):
        if b[i, j] and b[j, k] and b[k, i]:
            found.append((i, j, k))
        elif b[i, k] and b[k, j] and b[j, i]:
            found.append((i, k, j))
    return found


def has_cycle(p: Array) -> bool:
    """Whether the majority relation has a directed cycle of any length."""
    b = _beats(p)
    return connected_components(b, directed=True, connection="strong")[0] < len(b)


def winner(p: Array) -> int | None:
    """The Condorcet winner: preferred to every other answer; ``None`` when there is none."""
    best = np.flatnonzero(_beats(p).sum(1) == len(p) - 1)
    return int(best[0]) if len(best) else None


def loser(p: Array) -> int | None:
    """The Condorcet loser: every other answer is preferred to it."""
    return winner(1 - matrix(p))


def representable(p: Array) -> bool:
    """Whether some reward has ``r_i > r_j`` exactly where i is preferred to j: no cycle, and ties are ties of the reward."""
    b = _beats(p)
    score = b.sum(1) - b.sum(0)  # if there is such a reward, this is one
    return bool((b == (score[:, None] > score[None])).all())


def smith_set(p: Array) -> list[int]:
    """The smallest set of answers each of which is preferred to every answer outside."""
    b = _beats(p)
    order = np.argsort(b.sum(0) - b.sum(1), kind="stable")  # its members have the highest Copeland scores
    inside = next(k for k in range(1, len(b) + 1) if b[np.ix_(order[:k], order[k:])].all())
    return sorted(order[:inside].tolist())


# --- rewards ---------------------------------------------------------------------------------------------------------


def bt_fit(wins: Array | Sequence[Sequence[float]], *, ridge: float = 1e-9) -> Array:
    """Bradley-Terry rewards ``[n]`` of greatest likelihood, mean 0; ``wins`` are counts or a preference matrix.

    ``ridge`` keeps the reward of one that always wins finite.
    """
    w = np.asarray(wins, float)
    i, j = np.triu_indices(len(w), 1)
    d = np.zeros((len(i), len(w)))
    d[np.arange(len(i)), i], d[np.arange(len(i)), j] = 1.0, -1.0
    total = w[i, j] + w[j, i]
    share = np.where(total > 0, w[i, j] / np.where(total > 0, total, 1.0), 0.5)
    r = logistic(d, share, l2=ridge, weights=total)
    return r - r.mean()


def hodge_residual(p: Array, *, weights: Array | None = None, clip: float = 1e-6) -> tuple[Array, float]:
    """Least-squares rewards ``[n]`` of the log-odds, and the share of their (weighted) square sum that no reward explains.

    HodgeRank (Jiang et al. 2011): ``logit p[i, j] ≈ r_i - r_j``; 0 for exact Bradley-Terry preferences, 1 for pure cycles.
    ``weights``: symmetric, such as numbers of comparisons. Probabilities are kept ``clip`` away from 0 and 1.
    """
    a = np.clip(matrix(p), clip, 1 - clip)
    flow = np.log(a) - np.log1p(-a)
    w = np.ones_like(a) if weights is None else np.asarray(weights, float)
    w = w * (1 - np.eye(len(a)))
    laplacian = np.diag(w.sum(1)) - w
    r = np.linalg.lstsq(laplacian, (w * flow).sum(1), rcond=None)[0]
    rest, size = flow - (r[:, None] - r[None]), float((w * flow**2).sum())
    return r - r.mean(), float((w * rest**2).sum()) / size if size > 0 else 0.0


# --- games -----------------------------------------------------------------------------------------------------------


def nash(p: Array) -> Array:
    """A policy ``max_π min_π' πᵀpπ'`` (value ½) by linear programming; a point mass when there is a Condorcet winner."""
    a = matrix(p)
    n = len(a)
    found = linprog(
        np.append(np.zeros(n), -1.0), A_ub=np.column_stack([-a.T, np.ones(n)]), b_ub=np.zeros(n),
        A_eq=np.append(np.ones(n), 0.0)[None], b_eq=[1.0], bounds=[(0, None)] * n + [(None, None)], method="highs",
    )  # fmt: skip
    pi = np.maximum(found.x[:n], 0.0)
    return pi / pi.sum()


def worst_win_rate(p: Array, pi: Array) -> float:
    """Win rate of ``pi`` against the answer that is hardest for it; ½ for a Nash policy."""
    return float((np.asarray(pi) @ matrix(p)).min())


def _normalised(log: Array) -> Array:
    e = np.exp(log - log.max())
    return e / e.sum()


def _prior(p: Array, mu: Array | None) -> tuple[Array, Array]:
    a = matrix(p)
    m = np.full(len(a), 1 / len(a)) if mu is None else np.asarray(mu, float)
    if m.shape != (len(a),) or (m <= 0).any() or abs(m.sum() - 1) > 1e-9:
        raise UsageError("mu must be probabilities, none of them 0, one for each answer")
    return a, m


def regularised(p: Array, mu: Array | None = None, tau: float = 0.1) -> Array:
    """The unique policy ``π ∝ μ exp(pπ/τ)``: the Nash policy of ``P(π > π') - τ KL(π‖μ) + τ KL(π'‖μ)`` (arXiv:2312.00886).

    Newton's method on the logits, from a large τ downwards. The derivative, identity minus antisymmetric times covariance
    over τ, is never singular. ``mu``: uniform by default.
    """
    a, m = _prior(p, mu)
    theta, skew = np.log(m), a - 0.5
    for t in np.geomspace(max(1.0, tau), tau, 2 + int(8 * max(0.0, math.log(1 / tau)))):
        theta = _solve(skew, np.log(m), theta, float(t))
    return _normalised(theta)


def _solve(skew: Array, base: Array, theta: Array, tau: float) -> Array:
    def gap(x: Array) -> Array:
        return x - base - skew @ _normalised(x) / tau

    now = gap(theta)
    for _ in range(200):
        pi = _normalised(theta)
        slope = np.eye(len(pi)) - skew @ (np.diag(pi) - np.outer(pi, pi)) / tau
        step, share = np.linalg.solve(slope, -now), 1.0
        while share > 1e-8 and np.linalg.norm(gap(theta + share * step)) > (1 - 1e-4 * share) * np.linalg.norm(now):
            share /= 2
        theta = theta + share * step
        now = gap(theta)
        if np.abs(now).max() < 1e-12:
            break
    return theta


def nash_md(
    p: Array, mu: Array | None = None, tau: float = 0.1, steps: int = 1000, *, eta: float | None = None,
    start: Array | None = None,
) -> Array:  # fmt: skip
    """Iterates ``[steps + 1, n]`` of Nash mirror descent, from ``start`` (default μ).

    ``π^μ ∝ π^{1-ητ} μ^{ητ}``, then ``π ∝ π^μ exp(η pπ^μ)``. ``eta``: constant, or ``2/(τ(t + 2))`` for which
    ``KL(π*_τ‖π_T) ≤ 8/(τ²(T + 1))`` (arXiv:2312.00886, theorem 1; as remembered).
    """
    a, m = _prior(p, mu)
    base = np.log(m)
    log = base if start is None else np.log(np.asarray(start, float))
    found = [_normalised(log)]
    for t in range(steps):
        h = 2 / (tau * (t + 2)) if eta is None else eta
        mixed = (1 - h * tau) * log + h * tau * base
        log = mixed + h * (a @ _normalised(mixed))
        log = log - log.max()
        found.append(_normalised(log))
    return np.array(found)


def self_play(p: Array, mu: Array | None = None, steps: int = 1000, *, eta: float, start: Array | None = None) -> Array:
    """The same without the mixture, ``π ∝ π exp(η pπ)``: on a cycle its last iterate runs away from the Nash policy."""
    return nash_md(p, mu, tau=0.0, steps=steps, eta=eta, start=start)


# --- voters ----------------------------------------------------------------------------------------------------------


def majority(rankings: Array) -> Array:
    """``[D, n, n]`` preference matrices of ``[D, m, n]`` ranks (smaller is better): shares of voters."""
    r = np.asarray(rankings)
    p = (r[:, :, :, None] < r[:, :, None, :]).mean(1)
    n = r.shape[2]
    p[:, np.arange(n), np.arange(n)] = 0.5
    return p


def cycle_probability(
    n: int, m: int, draws: int = 10000, seed: int = 0, *, utilities: Array | None = None
) -> tuple[float, float]:
    """Simulated probabilities that m voters' majorities over n answers have a cycle, and that they have no Condorcet winner.

    Rankings are uniformly random (impartial culture); with ``utilities [n]`` they are draws of the Luce model.
    """
    rng = np.random.default_rng(seed)
    base = np.zeros(n) if utilities is None else np.asarray(utilities, float)
    cyclic = headless = 0
    for begin in range(0, draws, 2000):
        size = min(2000, draws - begin)
        score = base + rng.gumbel(size=(size, m, n))
        beats = majority((-score).argsort(2).argsort(2)) > 0.5
        wins = beats.sum(2)
        headless += int((wins.max(1) < n - 1).sum())
        if m % 2:  # no ties: acyclic exactly when all numbers of wins differ
            cyclic += int((np.sort(wins, 1) != np.arange(n)).any(1).sum())
        else:
            cyclic += sum(connected_components(b, directed=True, connection="strong")[0] < n for b in beats)
    return cyclic / draws, headless / draws
