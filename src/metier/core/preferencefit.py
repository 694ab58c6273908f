"""What explains pairwise choices: sparse logistic regressions without an intercept, their uncertainty, and small sets of columns.

A pair is a row of signed differences ``d = sign(s(A) - s(B))`` and a choice ``y`` (1: A, 0: B, between: undecided). The model is
``P(A) = σ(d·α)``. Without an intercept, showing the answers in the other order (``-d``, ``1 - y``) changes nothing.

    alpha = l1_logistic(d, y, scale=0.1)                 # maximum a posteriori, prior Laplace(0, scale)
    posterior_mean(d, y, scale=0.1, seed=0).mean         # Hamiltonian Monte Carlo, with its diagnostics
    bootstrap(d, y, scale=0.1, draws=200, seed=0)        # [draws, p]
    greedy(d, y, held_out, target=0.89)                  # few columns that explain nearly as much as all
    elo(first, second, outcome, models)                  # Bradley-Terry ratings

Everything is float64 numpy and a function of its arguments.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special, stats

from metier.core.errors import UsageError

Array = np.ndarray
SCALES = (0.003, 0.01, 0.03, 0.1, 0.3)
"""Widths of the prior tried by :func:`cross_validated`."""


def _checked(d: Array, y: Array, weights: Array | None) -> tuple[Array, Array, Array]:
    d, y = np.asarray(d, float), np.asarray(y, float)
    w = np.ones(len(y)) if weights is None else np.asarray(weights, float)
    if d.ndim != 2 or y.shape != (len(d),) or w.shape != y.shape:
        raise UsageError(f"differences {d.shape}, choices {y.shape} and weights {w.shape}: expected [N, p], [N] and [N]")
    if not (np.isfinite(d).all() and (w >= 0).all() and ((y >= 0) & (y <= 1)).all()):
        raise UsageError("differences must be finite, weights not negative, choices between 0 and 1")
    return d, y, w


# --- fits ------------------------------------------------------------------------------------------------------------


def logistic(
    d: Array, y: Array, *, l1: float = 0.0, l2: float = 0.0, weights: Array | None = None, start: Array | None = None,
    tol: float = 1e-10, steps: int = 200,
) -> Array:  # fmt: skip
    """The minimiser ``[p]`` of ``Σ w (log(1 + e^z) - y z) + l1 |α|₁ + l2/2 |α|²``, ``z = d α``.

    Newton steps with a line search; with ``l1`` each one's quadratic model is minimised by coordinate descent. Without any
    penalty, choices that a hyperplane separates have no minimiser: the last of ``steps`` iterates is returned.
    """
    d, y, w = _checked(d, y, weights)
    alpha = np.zeros(d.shape[1]) if start is None else np.array(start, float)

    def value(a: Array) -> float:
        return _loss(d @ a, y, w) + l1 * float(np.abs(a).sum()) + 0.5 * l2 * float(a @ a)

    now = value(alpha)
    for _ in range(steps):
        p = special.expit(d @ alpha)
        gradient = d.T @ (w * (p - y)) + l2 * alpha
        curvature = (d.T * (w * p * (1 - p))) @ d + (l2 + 1e-10) * np.eye(len(alpha))
        step = _soft_quadratic(curvature, gradient, alpha, l1, tol / 10) - alpha if l1 else -np.linalg.solve(curvature, gradient)
        alpha, now, moved = _along(value, alpha, step, now)
        if moved <= tol * (1 + float(np.abs(alpha).max(initial=0.0))):
            break
    return alpha


def _loss(z: Array, y: Array, w: Array) -> float:
    return float(w @ (np.logaddexp(0, z) - y * z))


def _along(value: Callable[[Array], float], alpha: Array, step: Array, now: float) -> tuple[Array, float, float]:
    """The first of ``alpha + step/2^k`` that is not worse, its value, and how far it is."""
    share = 1.0
    while share > 1e-12:
        there = alpha + share * step
        if (seen := value(there)) <= now:
            return there, seen, share * float(np.abs(step).max(initial=0.0))
        share /= 2
    return alpha, now, 0.0


def _soft_quadratic(h: Array, gradient: Array, at: Array, l1: float, tol: float) -> Array:
    """Minimiser of ``g·(x - at) + ½ (x - at)ᵀH(x - at) + l1 |x|₁`` by coordinate descent: over all coordinates, then over those
    that are not 0 until these rest, and so on."""
    x, slope, diagonal = at.copy(), gradient.copy(), np.diag(h).copy()

    def sweep(places: Sequence[int]) -> float:
        most = 0.0
        for j in places:
            aim = x[j] - slope[j] / diagonal[j]
            new = math.copysign(max(0.0, abs(aim) - l1 / diagonal[j]), aim)
            if change := new - x[j]:
                slope[:] += change * h[j]
                x[j] = new
                most = max(most, abs(change))
        return most

    for _ in range(50):
        if sweep(range(len(x))) <= tol:
            break
        active = np.flatnonzero(x).tolist()
        for _ in range(200):
            if sweep(active) <= tol:
                break
    return x


def l1_logistic(
    d: Array, y: Array, *, scale: float = 0.1, weights: Array | None = None, start: Array | None = None, tol: float = 1e-10
) -> Array:
    """Maximum a posteriori ``α [p]`` under ``α_j ~ Laplace(0, scale)``: logistic regression with penalty ``|α|₁ / scale``."""
    if not scale > 0:
        raise UsageError(f"scale = {scale}: expected > 0")
    return logistic(d, y, l1=1 / scale, weights=weights, start=start, tol=tol)


def bootstrap(
    d: Array, y: Array, *, scale: float = 0.1, draws: int = 200, seed: int = 0, clusters: Sequence | None = None
) -> Array:
    """``[draws, p]`` fits of :func:`l1_logistic` to resampled pairs; pairs of one cluster (a prompt) are drawn together."""
    d, y, _ = _checked(d, y, None)
    names, member = np.unique(np.arange(len(y)) if clusters is None else np.asarray(clusters), return_inverse=True)
    start, share = l1_logistic(d, y, scale=scale), np.full(len(names), 1 / len(names))
    counts = np.random.default_rng(seed).multinomial(len(names), share, size=draws)
    fits = [l1_logistic(d, y, scale=scale, weights=c[member], start=start, tol=1e-6) for c in counts]
    return np.array(fits).reshape(draws, d.shape[1])


# --- the posterior ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Posterior:
    """What the sampler found."""

    mean: Array
    sd: Array
    draws: Array
    """``[chains, draws, p]``; mean and standard deviation are ``[p]``."""
    rhat: float
    """Largest split-R̂ of a coordinate; near 1 when the chains agree."""
    ess: float
    """Smallest effective number of draws of a coordinate."""
    acceptance: float


def posterior_mean(
    d: Array, y: Array, *, scale: float = 0.1, draws: int = 250, warmup: int = 100, chains: int = 4, leaps: int = 8, seed: int = 0
) -> Posterior:
    """Posterior of ``α`` under ``Laplace(0, scale)`` priors by Hamiltonian Monte Carlo.

    Momenta have the curvature at the mode as their mass, so that the target is nearly isotropic; the step is tuned in the
    warm-up for 80 % acceptance (or more), then varied by ±20 %. The kinks of the prior cost acceptance, not exactness. The paper
    took 2000 draws after a warm-up of 500 (4 chains, NUTS); fewer are the default here, and ``ess`` says if they suffice.
    """
    d, y, _ = _checked(d, y, None)
    mode = l1_logistic(d, y, scale=scale)
    p = special.expit(d @ mode)
    mass = (d.T * (p * (1 - p))) @ d + np.eye(len(mode)) / (2 * scale**2)  # a Laplace variable has variance 2 scale²
    root = np.linalg.inv(np.linalg.cholesky(mass)).T

    def energy(u: Array) -> tuple[Array, Array]:
        """Minus log density ``[C]`` and its gradient ``[C, p]`` at ``α = mode + root u``."""
        a = mode + u @ root.T
        z = a @ d.T
        value = (np.logaddexp(0, z) - y * z).sum(1) + np.abs(a).sum(1) / scale
        return value, ((special.expit(z) - y) @ d + np.sign(a) / scale) @ root

    found, accepted = _hamiltonian(energy, (chains, len(mode)), draws, warmup, leaps, np.random.default_rng(seed))
    alpha = mode + found @ root.T
    flat = alpha.reshape(-1, len(mode))
    return Posterior(
        flat.mean(0), flat.std(0, ddof=1), alpha, float(split_rhat(alpha).max()), float(effective(alpha).min()), accepted
    )


Energy = Callable[[Array], tuple[Array, Array]]


def _hamiltonian(
    energy: Energy, shape: tuple[int, int], draws: int, warmup: int, leaps: int, rng: np.random.Generator
) -> tuple[Array, float]:
    """``[chains, draws, p]`` and the share of accepted proposals."""
    u = rng.standard_normal(shape)
    value, slope = energy(u)
    longest = 2.0 / leaps  # about a quarter turn on the nearly isotropic target; whole turns would come back to where they began
    size, kept, accepted = longest, [], 0.0
    for i in range(warmup + draws):
        steps = size * rng.uniform(0.8, 1.2, (shape[0], 1))
        momentum = rng.standard_normal(shape)
        there, new_value, new_slope, end = _leapfrog(energy, u, slope, momentum, steps, leaps)
        gap = value + 0.5 * (momentum**2).sum(1) - new_value - 0.5 * (end**2).sum(1)
        chance = np.exp(np.minimum(0.0, np.where(np.isfinite(gap), gap, -np.inf)))
        take = rng.random(shape[0]) < chance
        u, slope = (np.where(take[:, None], a, b) for a, b in ((there, u), (new_slope, slope)))
        value = np.where(take, new_value, value)
        if i < warmup:
            size = min(longest, size * math.exp((float(chance.mean()) - 0.8) / math.sqrt(1 + i / 4)))
        else:
            kept.append(u)
            accepted += float(chance.mean()) / draws
    return np.stack(kept, 1), accepted


def _leapfrog(energy: Energy, u: Array, slope: Array, momentum: Array, steps: Array, leaps: int) -> tuple[Array, ...]:
    """Place, its energy and slope, and momentum after ``leaps`` steps."""
    v, value = momentum - 0.5 * steps * slope, np.zeros(len(u))
    for k in range(leaps):
        u = u + steps * v
        value, slope = energy(u)
        v = v - (1.0 if k + 1 < leaps else 0.5) * steps * slope
    return u, value, slope, v


def split_rhat(draws: Array) -> Array:
    """Split-R̂ ``[p]`` of ``[chains, draws, p]`` (Gelman et al., Bayesian Data Analysis, section 11.4)."""
    half = draws.shape[1] // 2
    parts = np.concatenate([draws[:, :half], draws[:, half : 2 * half]])
    within = parts.var(1, ddof=1).mean(0)
    between = half * parts.mean(1).var(0, ddof=1)
    return np.sqrt((half - 1) / half + between / (half * np.maximum(within, 1e-300)))


def effective(draws: Array) -> Array:
    """Effective number of draws ``[p]`` of ``[chains, draws, p]``: autocorrelations are summed while pairs are positive."""
    chains, n, _ = draws.shape
    centred = draws - draws.mean(1, keepdims=True)
    spectrum = np.abs(np.fft.rfft(centred, 2 * n, axis=1)) ** 2
    autocovariance = np.fft.irfft(spectrum, axis=1)[:, :n].mean(0) / n
    within = draws.var(1, ddof=1).mean(0)
    total = within * (n - 1) / n + (draws.mean(1).var(0, ddof=1) if chains > 1 else 0.0)
    rho = 1 - (within - autocovariance * n / (n - 1)) / np.maximum(total, 1e-300)
    pairs = rho[0 : 2 * (n // 2) : 2] + rho[1 : 2 * (n // 2) : 2]
    positive = np.minimum.accumulate(np.where(np.logical_and.accumulate(pairs > 0), pairs, 0.0))
    return chains * n / np.maximum(2 * positive.sum(0) - 1, 1 / math.log10(max(10, chains * n)))


# --- judges ----------------------------------------------------------------------------------------------------------


def order_averaged(first_shown: Array, swapped: Array) -> Array:
    """Choices ``[N]`` of a judge asked in both orders: 1 for A, 0 for B, ½ for a tie.

    ``first_shown [N, 2]``: its scores for the first and the second place with A in the first; ``swapped`` with B in the first.
    A is chosen when ``first_shown[0] + swapped[1] > first_shown[1] + swapped[0]``: a bonus for a place that is the same in
    both orders cancels.
    """
    a, b = np.asarray(first_shown, float), np.asarray(swapped, float)
    gap = (a[:, 0] - a[:, 1]) - (b[:, 0] - b[:, 1])
    return np.where(gap > 0, 1.0, np.where(gap < 0, 0.0, 0.5))


def similarity(a: Array, b: Array) -> float:
    """Pearson correlation of the vectors of two judges, ``[p]``, or its mean over groups, ``[G, p]``; 0 for a constant vector."""
    x, z = (np.atleast_2d(np.asarray(v, float)) for v in (a, b))
    if x.shape != z.shape or x.shape[1] < 2:
        raise UsageError(f"vectors of shape {x.shape} and {z.shape} have no correlation")
    x, z = (v - v.mean(1, keepdims=True) for v in (x, z))
    size = np.sqrt((x**2).sum(1) * (z**2).sum(1))
    return float(np.mean(np.divide((x * z).sum(1), size, out=np.zeros_like(size), where=size > 0)))


def best_first(values: Array, alpha: Array) -> Array:
    """Order ``[K]`` of K answers to one prompt, best first for a judge with ``alpha``, from property values ``[K, p]``.

    An answer's score is the mean of ``sign(s_k - s_j)·α`` over the others; equal scores keep their order.
    """
    s = np.asarray(values, float)
    score = np.sign(s[:, None] - s[None]).sum(1) @ np.asarray(alpha, float)
    return np.argsort(-score, kind="stable")


# --- few columns -----------------------------------------------------------------------------------------------------


def explained(d: Array, y: Array, alpha: Array) -> float:
    """Explained variation ``1 - Dev(α) / Dev(0)``; a coin explains 0, a choice foreseen exactly 1."""
    d, y, w = _checked(d, y, None)
    return 1 - _loss(d @ np.asarray(alpha, float), y, w) / (len(y) * math.log(2))


def coverage(m: Array, y: Array, columns: Sequence[int]) -> float:
    """Share of pairs whose choice at least one of ``columns`` favours."""
    toward = np.asarray(m)[:, list(columns)] * np.sign(2 * np.asarray(y, float) - 1)[:, None]
    return float((toward > 0).any(1).mean()) if len(toward) else 0.0


def cross_validated(d: Array, y: Array, *, scales: Sequence[float] = SCALES, folds: int = 3, seed: int = 0) -> float:
    """The prior width with the least deviance on left-out folds."""
    d, y, _ = _checked(d, y, None)
    fold = np.random.default_rng(seed).permutation(len(y)) % folds
    total = np.zeros(len(scales))
    for k in range(folds):
        out, alpha = fold == k, None
        for i, scale in enumerate(sorted(scales)):
            alpha = l1_logistic(d[~out], y[~out], scale=scale, start=alpha, tol=1e-4)
            total[i] += _loss(d[out] @ alpha, y[out], np.ones(out.sum()))
    return sorted(scales)[int(total.argmin())]


@dataclass(frozen=True)
class Basis:
    """Columns in the order they were chosen, and what the first k of them explain."""

    columns: list[int]
    fitted: list[float]
    """Explained variation on the pairs fitted to, after each column."""
    held_out: list[float]
    """The same on the others."""
    coverage: list[float]
    """Share of held-out pairs whose choice one of the columns favours."""
    full: float
    """Explained variation of all columns on the held-out pairs, with the prior chosen by cross-validation."""
    scale: float
    alpha: Array
    """``[k]`` weights of the columns."""

    @property
    def share(self) -> float | None:
        """Of what all columns explain, on held-out pairs; ``None`` when that is nothing."""
        return (self.held_out or [0.0])[-1] / self.full if self.full > 0 else None


def greedy(
    m: Array, y: Array, held_out: Array, *, target: float = 0.89, most: int | None = None, level: float = 0.05, near: int = 8
) -> Basis:
    """Add the column that explains most until ``target`` of what all columns explain on ``held_out`` pairs (bool ``[N]``).

    Chosen and fitted on the other pairs: the ``near`` columns with the largest score statistics are tried. It also ends when
    the largest statistic could be that of ``p`` columns of chance (Bonferroni, ``level``), or with ``most`` columns.
    """
    m, y, _ = _checked(m, y, None)
    out = np.asarray(held_out, bool)
    if out.all() or not out.any():
        raise UsageError("some pairs must be held out, and some not")
    (d, c), (test, truth) = (m[~out], y[~out]), (m[out], y[out])
    scale = cross_validated(d, c)
    full = explained(test, truth, l1_logistic(d, c, scale=scale, tol=1e-6))
    enough = float(stats.chi2.isf(level / m.shape[1], 1))
    chosen, alpha, fitted, seen, covered = [], np.zeros(0), [], [], []
    while len(chosen) < (most or m.shape[1]) and not (full > 0 and seen and seen[-1] >= target * full):
        candidate = _next(d, c, chosen, alpha, enough, near)
        if candidate is None:
            break
        chosen.append(candidate)
        alpha = logistic(d[:, chosen], c, start=np.append(alpha, 0.0), l2=1e-6)
        fitted.append(explained(d[:, chosen], c, alpha))
        seen.append(explained(test[:, chosen], truth, alpha))
        covered.append(coverage(test, truth, chosen))
    return Basis(chosen, fitted, seen, covered, full, scale, alpha)


def _next(d: Array, y: Array, chosen: list[int], alpha: Array, enough: float, near: int) -> int | None:
    """The column that lowers the deviance most, or ``None`` when none does so by more than chance."""
    p = special.expit(d[:, chosen] @ alpha)
    gradient, variance = d.T @ (y - p), p * (1 - p)
    information = (d**2).T @ variance
    if chosen:  # what the chosen columns explain of a column is not new
        shared = (d[:, chosen].T * variance) @ d
        own = shared[:, chosen] + 1e-9 * np.eye(len(chosen))
        information = information - (shared * np.linalg.solve(own, shared)).sum(0)
    usable = information > 1e-6 * len(y)
    usable[chosen] = False
    statistic = np.where(usable, gradient**2 / np.where(usable, information, 1.0), -1.0)
    if statistic.max(initial=-1.0) < enough:
        return None
    tried = [int(j) for j in np.argsort(-statistic, kind="stable")[:near] if statistic[j] > 0]
    fits = {j: logistic(d[:, [*chosen, j]], y, start=np.append(alpha, 0.0), l2=1e-6, tol=1e-5) for j in tried}
    return min(tried, key=lambda j: _loss(d[:, [*chosen, j]] @ fits[j], y, np.ones(len(y))))


def attributed(m: Array, y: Array, column: int, alpha: Array | None = None, *, alone: bool = False) -> Array:
    """Which pairs (bool ``[N]``) owe their choice to ``column``: it favours the chosen answer, and of all columns that do
    (by ``alpha``'s weight where given, else alike) none counts more; ties count. ``alone``: no other tells the answers apart."""
    toward = np.asarray(m, float) * np.sign(2 * np.asarray(y, float) - 1)[:, None]
    pull = np.maximum(0.0, toward * (1.0 if alpha is None else np.asarray(alpha, float)))
    most = (pull[:, column] > 0) & (pull[:, column] >= pull.max(1))
    return most & ((toward != 0).sum(1) == 1) if alone else most


# --- ratings ---------------------------------------------------------------------------------------------------------


def elo(
    first: Sequence[str], second: Sequence[str], outcome: Array, models: Sequence[str], *, ridge: float = 1e-2,
    weights: Array | None = None,
) -> Array:  # fmt: skip
    """Bradley-Terry ratings ``[M]`` of ``models`` on the Elo scale (400 points are odds of ten to one), mean 0.

    ``outcome [N]``: 1 when the first won, 0 the second, ½ a draw. ``ridge`` keeps the rating of one that always wins finite.
    """
    place = {name: i for i, name in enumerate(models)}
    d = np.zeros((len(outcome), len(models)))
    for row, (a, b) in enumerate(zip(first, second, strict=True)):
        d[row, place[a]] += 1
        d[row, place[b]] -= 1
    theta = logistic(d, outcome, l2=ridge, weights=weights)
    return (theta - theta.mean()) * 400 / math.log(10)
