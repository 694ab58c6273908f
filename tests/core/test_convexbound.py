"""Oracle of core/convexbound: Theorem 10 term by term, closed forms, the values the paper's code gives, published losses.

Bugs it is meant to catch: an index shifted in a suffix sum, the last entry counted as an update, D or G not squared, the
telescoped sum wrong for G_t that vary, plans that solve for the wrong branch.
"""

import numpy as np
import pytest
from convex_oracle import PUBLISHED, theorem
from scipy.stats import spearmanr

from metier.core import convexbound as cb
from metier.core import part
from metier.core.cooldown import SHAPES, fall
from metier.core.errors import UsageError
from metier.core.schedule import Schedule


@pytest.mark.parametrize("steps", [1, 2, 3, 50])
def test_the_telescoped_form_is_the_theorem(steps):
    rng = np.random.default_rng(steps)
    for _ in range(5):
        eta, g, d = rng.uniform(0.01, 2, steps), rng.uniform(0.1, 3, steps), rng.uniform(0.5, 2)
        assert cb.bound(eta, grads=g, distance=d) == pytest.approx(theorem(eta, g, d), rel=1e-12)


def test_constant_in_closed_form():
    gamma, d, g = 0.3, 1.7, 0.6
    at = [1, 2, 10, 400]
    expected = [d**2 / (2 * gamma * t) + gamma * g**2 / 2 * (1 + sum(1 / k for k in range(1, t))) for t in at]
    np.testing.assert_allclose(cb.curve(np.full(400, gamma), at, grads=g, distance=d), expected, rtol=1e-12)


def test_best_factor_and_scaling():
    s, g = cb.plateau(300, 0.3, "sqrt"), np.linspace(1, 2, 300)
    first, second = cb.terms(s, grads=g, distance=1.5)
    gamma, least = cb.tuned(s, grads=g, distance=1.5)
    for scale in (0.3, 1.0, 4.0):
        assert cb.bound(scale * s, grads=g, distance=1.5) == pytest.approx(first / scale + scale * second)
    assert least == pytest.approx(2 * np.sqrt(first * second)) == cb.bound(gamma * s, grads=g, distance=1.5)
    assert cb.bound(0.99 * gamma * s, grads=g, distance=1.5) > least < cb.bound(1.01 * gamma * s, grads=g, distance=1.5)
    assert cb.tuned(s, grads=3 * g, distance=1.5)[1] == pytest.approx(3 * least)
    assert cb.tuned(s, grads=g, distance=4.5) == (pytest.approx(3 * gamma), pytest.approx(3 * least))
    rescaled = cb.tuned(7 * s, grads=g, distance=1.5)
    assert (7 * rescaled[0], rescaled[1]) == (pytest.approx(gamma), pytest.approx(least))


@pytest.mark.parametrize(
    ("steps", "rates", "bounds"),
    [
        (400, [0.01818, 0.02537, 0.02685, 0.04824, 0.04956], [2.751, 2.187, 2.146, 2.068, 2.013]),
        (4000, None, [3.142, 2.164, 2.129, 2.061, 2.002]),
    ],
)
def test_values_of_the_papers_schedules(steps, rates, bounds):
    refs = ["constant", {"wsd": {"decay": 0.2, "shape": "linear"}}, {"wsd": {"decay": 0.2}}, "cosine", "linear"]
    got = [cb.tuned(cb.multipliers(Schedule(part.build("schedule", r)).at, steps)) for r in refs]
    np.testing.assert_allclose([b * steps**0.5 for _, b in got], bounds, atol=6e-4)
    if rates:
        np.testing.assert_allclose([g for g, _ in got], rates, atol=6e-6)


def test_plateau_is_the_schedule_part():
    at = Schedule(part.build("schedule", {"wsd": {"decay": 0.37, "shape": "cosine", "drop": 0.6, "drop_at": 0.5}})).at
    np.testing.assert_allclose(cb.plateau(151, 0.37, "cosine", drop=0.6, drop_at=75.5), cb.multipliers(at, 151), rtol=1e-12)


def test_longer_cooldowns_and_learning_rate_transfer():
    at = (0.1, 0.2, 0.3, 0.5, 0.8, 1.0)
    least = [20 * cb.tuned(cb.plateau(400, c))[1] for c in at]
    np.testing.assert_allclose(least, [2.323, 2.187, 2.117, 2.048, 2.015, 2.013], atol=6e-4)
    ratios = [cb.transfer(4000, c, 1.0) for c in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8)]
    np.testing.assert_allclose(ratios, [2.18, 1.95, 1.78, 1.65, 1.52, 1.41, 1.20], atol=0.011)
    assert cb.transfer(4000, 0.3, 0.3) == 1.0


def test_best_cooldown_is_inside_and_grows_with_the_learning_rate():
    gamma = cb.tuned(cb.plateau(400, 0.3))[0]
    found = [cb.best_cooldown(400, f * gamma) for f in (0.7, 1.0, 1.3)]
    assert 0.05 < found[0] < found[1] < found[2] < 1
    at = cb.bound(gamma * cb.plateau(400, found[1]))
    assert at < min(cb.bound(gamma * cb.plateau(400, found[1] + d)) for d in (-0.05, 0.05))


@pytest.mark.parametrize(
    ("factor", "cooldown", "level"), [(1.5, 0.445, 0.638), (2, 0.635, 0.532), (3, 0.875, 0.430), (4, 1.0, 0.375)]
)
def test_extending_a_run(factor, cooldown, level):
    assert cb.extend_cooldown(4000, int(factor * 4000)) == pytest.approx(cooldown, abs=0.003)
    assert cb.extend_plateau(4000, int(factor * 4000)) == pytest.approx(level, abs=0.003)


def test_both_extensions_beat_keeping_everything():
    gamma = cb.tuned(cb.plateau(4000, 0.2))[0]
    keep = cb.bound(gamma * cb.plateau(8000, 0.2))
    longer = cb.bound(gamma * cb.plateau(8000, cb.extend_cooldown(4000, 8000)))
    lower = cb.bound(gamma * cb.plateau(8000, 0.2, drop=cb.extend_plateau(4000, 8000), drop_at=3200))
    np.testing.assert_allclose(
        [longer, lower, keep, cb.tuned(cb.plateau(8000, 1.0))[1]], [0.0225, 0.0231, 0.0256, 0.0224], atol=6e-5
    )


def test_the_minimiser_is_below_everything_and_near_linear():
    best = cb.minimiser(100)
    least = cb.bound(best)
    linear = cb.tuned(cb.plateau(100, 1.0))[1]
    assert 1.015 < linear / least < 1.02  # 1.7 % by projected gradient descent in the paper
    rng = np.random.default_rng(0)
    for size in (1e-3, 0.1, 1.0):
        assert cb.bound(best * np.exp(size * rng.standard_normal(100))) > least
    assert cb.tuned(best)[0] == pytest.approx(1.0)


def test_published_losses_are_ranked_with_one_scale():
    steps, fractions = 5000, list(PUBLISHED)
    base = cb.tuned(cb.plateau(steps, 0.2))[0]
    losses = np.array([PUBLISHED[c] for c in fractions]).ravel()

    parts = [cb.terms(cb.plateau(steps, c)) for c in fractions]

    def rank(scale):
        found = [a / (base * scale * f) + base * scale * f * b for a, b in parts for f in (0.5, 1.0, 2.0)]
        return spearmanr(found, losses).statistic

    scales = np.linspace(0.5, 2.5, 41)
    ranks = [rank(s) for s in scales]
    assert max(ranks) >= 0.7
    assert 0.7 <= scales[int(np.argmax(ranks))] <= 1.7
    assert rank(1.12) == pytest.approx(0.78, abs=0.01)


def test_steps_of_size_zero():
    assert cb.bound([1.0, 0.5, 0.0, 0.0]) == cb.bound([1.0, 0.5])
    assert np.isfinite(cb.bound([0.0, 1.0, 0.0, 0.5]))
    for bad in ([0.0, 0.0], [1.0, -0.1], [1.0, np.nan], [[1.0]], []):
        with pytest.raises(UsageError, match="step sizes"):
            cb.bound(bad)
    with pytest.raises(UsageError, match="gradient norms"):
        cb.bound([1.0, 1.0], grads=[1.0, 0.0])


def test_a_million_steps():
    eta = np.full(1_000_000, 0.1)
    assert cb.bound(eta) == pytest.approx(5e-6 + 0.05 * (1 + np.log(999_999) + np.euler_gamma), rel=1e-6)


def test_shapes_start_and_end_exactly():
    for shape in SHAPES:
        values = [fall(shape, y) for y in np.linspace(-0.1, 1.1, 100)]
        assert (fall(shape, 0.0), fall(shape, 1.0), values[0], values[-1]) == (1.0, 0.0, 1.0, 0.0)
        assert (np.diff(values) <= 0).all()
