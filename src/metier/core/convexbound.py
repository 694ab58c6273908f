"""How good is a schedule of step sizes? A bound on the last iterate of subgradient descent, and plans made with it.

``x_{t+1} = x_t - eta_t g_t`` for t = 1, 2, … on a convex function, ``|x_1 - x*| <= D`` and ``|g_t| <= G_t``. For step sizes
``eta_1 … eta_T``, with S their sum and A_k the sum of those after k, Theorem 10 of Defazio et al. (arXiv:2310.07831) says

    f(x_T) - f* <= Omega_T = D²/(2S) + sum_t eta_t² G_t² / (2S)
                             + sum_{k<T} eta_k / (2 A_k) (sum_{t>=k} eta_t² G_t²) / (sum_{t>=k} eta_t)

As ``eta_k / (A_k (A_k + eta_k)) = 1/A_k - 1/(A_k + eta_k)``, the sum over k telescopes, and what is left is

    Omega_T = D²/(2S) + sum_{t<T} eta_t² G_t² / (2 A_t) + eta_T G_T² / 2

which costs O(T) and has no differences in which digits could cancel. With ``eta = gamma s`` it is ``T1/gamma + gamma T2``.
Schaipp et al. (arXiv:2501.18965) show that it has the shape of the loss curves of language models. The last entry is not an
update of ``x_T``. Everywhere D is ``distance`` and G ``grads`` (one number, or one per step), both 1 unless given.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy import ndarray

from metier.core.clock import Clock
from metier.core.cooldown import Shape, fall, into_cooldown
from metier.core.errors import UsageError

Grads = float | Sequence[float] | ndarray


def weights(eta: Sequence[float] | ndarray) -> ndarray:
    """``w_t`` of ``Omega_T = D²/(2S) + sum_t w_t G_t²``, for step sizes ``[T]``.

    Steps of size 0 at the end move nothing and get weight 0 (the bound of the run without them). Raises ``UsageError`` for
    step sizes that are negative, not finite, or all 0.
    """
    eta = np.asarray(eta, dtype=float)
    if eta.ndim != 1 or not np.isfinite(eta).all() or (eta < 0).any() or not eta.any():
        raise UsageError("step sizes must be a sequence of numbers that are not negative, and not all 0")
    last = int(np.flatnonzero(eta)[-1])
    after = np.cumsum(eta[last::-1])[::-1]
    w = np.zeros_like(eta)
    w[:last] = eta[:last] ** 2 / (2 * after[1:])
    w[last] = eta[last] / 2
    return w


def terms(eta: Sequence[float] | ndarray, *, grads: Grads = 1.0, distance: float = 1.0) -> tuple[float, float]:
    """``(D²/(2S), sum_t w_t G_t²)``: the first falls with the step size, the second grows with it."""
    eta = np.asarray(eta, dtype=float)
    w = weights(eta)
    return distance**2 / (2 * float(eta.sum())), float(w @ _profile(grads, len(eta)) ** 2)


def bound(eta: Sequence[float] | ndarray, *, grads: Grads = 1.0, distance: float = 1.0) -> float:
    """``Omega_T`` of step sizes ``[T]``."""
    return sum(terms(eta, grads=grads, distance=distance))


def tuned(shape: Sequence[float] | ndarray, *, grads: Grads = 1.0, distance: float = 1.0) -> tuple[float, float]:
    """The best factor ``gamma* = sqrt(T1/T2)`` for a schedule, and its bound ``2 sqrt(T1 T2)``."""
    first, second = terms(shape, grads=grads, distance=distance)
    return math.sqrt(first / second), 2 * math.sqrt(first * second)


def curve(
    eta: Sequence[float] | ndarray, at: Sequence[int], *, grads: Grads = 1.0, distance: float = 1.0
) -> ndarray:  # fmt: skip
    """``Omega_t`` for every ``t`` in ``at`` (from 1): the loss curve that the bound predicts, up to scale and offset."""
    profile = _profile(grads, len(eta))
    return np.array([bound(eta[:t], grads=profile[:t], distance=distance) for t in at])


def minimiser(steps: int, *, grads: Grads = 1.0) -> ndarray:
    """The step sizes ``[steps]`` of least ``Omega``, for D = 1. Exact, O(T): no search.

    With ``a_t = A_{t-1}`` the bound is ``D²/(2 a_1) + sum_t (a_t - a_{t+1})² G_t² / (2 a_{t+1}) + a_T G_T² / 2``. What the
    steps from t on add is ``a_t f_t`` when they are best: ``f_T = G_T²/2`` and ``f_t = G_t² (sqrt(1 + 2 f_{t+1}/G_t²) - 1)``,
    reached at ``a_{t+1} = a_t / sqrt(1 + 2 f_{t+1}/G_t²)``; and ``a_1 = D / sqrt(2 f_1)`` gives ``Omega = D sqrt(2 f_1)``.
    """
    square = (_profile(grads, steps) ** 2).tolist()
    f, shrink = square[-1] / 2, [0.0] * steps
    for t in range(steps - 2, -1, -1):
        x = 2 * f / square[t]
        root = math.sqrt(1 + x)
        shrink[t], f = 1 / root, square[t] * x / (root + 1)
    left = np.cumprod([1 / math.sqrt(2 * f), *shrink[:-1]])
    return left * (1 - np.array(shrink))


def _profile(grads: Grads, steps: int) -> ndarray:
    found = np.broadcast_to(np.asarray(grads, dtype=float), (steps,))
    if not (np.isfinite(found).all() and (found > 0).all()):
        raise UsageError("gradient norms must be positive")
    return found


# --- plans: plateau, then a cooldown to 0 ------------------------------------------------------------------------------------


def multipliers(schedule: Callable[[Clock], float], steps: int, *, tokens_per_step: float = 0.0) -> ndarray:
    """A schedule's values ``[steps]``, such as the ``at`` of :class:`metier.core.schedule.Schedule`."""
    clocks = (Clock(s, steps, round(s * tokens_per_step), tokens_per_step) for s in range(steps))
    return np.array([schedule(c) for c in clocks])


def plateau(steps: int, cooldown: float, shape: Shape = "linear", *, drop: float = 1.0, drop_at: float = 0.0) -> ndarray:
    """1, from step ``drop_at`` on ``drop``, and over the last ``cooldown`` of the run down to 0. ``[steps]``"""
    s = np.arange(steps)
    level = np.where(s >= drop_at, drop, 1.0)
    y = [into_cooldown(i, steps, cooldown) for i in s.tolist()]
    return level * np.array([fall(shape, v) for v in y])


def transfer(steps: int, before: float, after: float, *, shape: Shape = "linear", to: Shape | None = None) -> float:
    """What a tuned learning rate is multiplied by when the cooldown changes from ``before`` of the run to ``after`` of it."""
    return tuned(plateau(steps, after, to or shape))[0] / tuned(plateau(steps, before, shape))[0]


def best_cooldown(steps: int, gamma: float, *, shape: Shape = "linear", grads: Grads = 1.0, distance: float = 1.0) -> float:
    """The cooldown of least bound when the learning rate stays ``gamma``, to 0.005 of the run. Larger ones want longer ones."""
    fractions = np.linspace(0.005, 1, 200)
    return float(min(fractions, key=lambda c: bound(gamma * plateau(steps, c, shape), grads=grads, distance=distance)))


def extend_cooldown(steps: int, longer: int, cooldown: float = 0.2, *, shape: Shape = "linear") -> float:
    """Cooldown for which the learning rate tuned for ``steps`` is the best one for ``longer`` steps too; 1 if none is enough."""
    wanted = tuned(plateau(steps, cooldown, shape))[0]
    return _solve(lambda c: tuned(plateau(longer, c, shape))[0] - wanted, cooldown, 1.0)


def extend_plateau(steps: int, longer: int, cooldown: float = 0.2, *, shape: Shape = "linear") -> float:
    """The other way: the level to which the plateau falls where the first cooldown began, keeping the cooldown's fraction."""
    wanted = tuned(plateau(steps, cooldown, shape))[0]
    at = (1 - cooldown) * steps

    def excess(level: float) -> float:
        return wanted - tuned(plateau(longer, cooldown, shape, drop=level, drop_at=at))[0]

    # The best rate grows as the level falls, until there is next to nothing after the drop: the crossing wanted is the highest.
    levels = np.linspace(1.0, 0.05, 39)
    low = next((level for level in levels if excess(float(level)) <= 0), levels[-1])
    return _solve(excess, float(low), 1.0)


def _solve(f: Callable[[float], float], low: float, high: float) -> float:
    """Where the growing function ``f`` crosses 0, or the end that is nearest to it."""
    if f(low) >= 0 or f(high) <= 0:
        return low if f(low) >= 0 else high
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if f(middle) < 0 else (low, middle)
    return (low + high) / 2
