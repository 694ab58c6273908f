"""Oracle of law/surge: draws of the signs, the expectation by enumeration, optima by brute force.

Bugs it is meant to catch: sigma/B for sigma²/B, erf without √2, the diagonal counted twice or left out, B_noise inverted or
without pi/2, ranks of the sign and the SGD law mixed up, a peak in the wrong place.
"""

import itertools

import numpy as np
import pytest

from metier.core import laws, part
from metier.parts.law.surge import Surge
from metier.testing import check_part

BATCHES = 2.0 ** np.arange(0, 24, 0.25)


def problem(seed, n, coupling):
    """A positive definite Hessian whose off-diagonal entries pull the same way as the gradient."""
    rng = np.random.default_rng(seed)
    g = rng.uniform(0.5, 1.5, n) * rng.choice([-1, 1], n)
    sigma = rng.uniform(20, 60, n)
    s = np.sign(g)
    return g, sigma, np.diag(rng.uniform(1, 2, n)) + coupling * np.outer(s, s)


def draws(g, sigma, batch, count, seed=0):
    rng = np.random.default_rng(seed)
    return np.sign(g + sigma / np.sqrt(batch) * rng.standard_normal((count, len(g))))


def test_contract():
    check_part("law/surge")


@pytest.mark.parametrize("batch", [1.0, 64.0, 4096.0])
def test_mean_of_signs(batch):
    g, sigma, _ = problem(0, 8, 0.1)
    seen = draws(g, sigma, batch, 40_000)
    error = np.maximum(seen.std(0), 1e-3) / np.sqrt(len(seen))
    assert (np.abs(seen.mean(0) - Surge.sign_mean(g, sigma, batch)) < 4 * error).all()


@pytest.mark.parametrize(("n", "batch"), [(6, 32.0), (100, 300.0)])
def test_decrease_and_best_by_drawing(n, batch):
    g, sigma, h = problem(1, n, 0.3)
    signs = draws(g, sigma, batch, 40_000, seed=2)
    linear, square = signs @ g, np.einsum("si,ij,sj->s", signs, h, signs)
    lr = 0.7 * Surge.best(g, sigma, h, batch)
    falls = lr * linear - lr**2 / 2 * square
    assert abs(falls.mean() - Surge.decrease(g, sigma, h, batch, lr)) < 4 * falls.std() / np.sqrt(len(signs))
    drawn = linear.mean() / square.mean()
    error = drawn * np.hypot(linear.std() / linear.mean(), square.std() / square.mean()) / np.sqrt(len(signs))
    assert abs(drawn - Surge.best(g, sigma, h, batch)) < 4 * error


def test_decrease_by_enumeration():
    g, sigma, h = problem(3, 4, 0.4)
    u, total = Surge.sign_mean(g, sigma, 200.0), 0.0
    for s in itertools.product((-1, 1), repeat=4):
        s = np.array(s)
        total += np.prod((1 + s * u) / 2) * (0.05 * g @ s - 0.05**2 / 2 * s @ h @ s)
    assert Surge.decrease(g, sigma, h, 200.0, 0.05) == pytest.approx(total, rel=1e-12)


def test_best_is_the_largest_fall():
    g, sigma, h = problem(4, 12, 0.2)
    best = Surge.best(g, sigma, h, 100.0)
    rates = best * np.linspace(0.5, 1.5, 2001)
    falls = [Surge.decrease(g, sigma, h, 100.0, r) for r in rates]
    assert rates[np.argmax(falls)] == pytest.approx(best, rel=1e-3)
    assert max(falls) == pytest.approx(best * g @ Surge.sign_mean(g, sigma, 100.0) / 2)


def test_large_batches_take_the_step_of_the_sign():
    g, sigma, h = problem(5, 10, 0.2)
    s = np.sign(g)
    limit = g @ s / (s @ h @ s)
    assert Surge.best(g, sigma, h, np.inf) == pytest.approx(limit)
    assert Surge.best(g, sigma, h, 1e9) == pytest.approx(limit, rel=1e-9)


def test_diagonal_curvature_has_no_fall():
    g, sigma, h = problem(6, 10, 0.0)
    rates = np.array([Surge.best(g, sigma, h, b) for b in BATCHES])
    expected = [g @ Surge.sign_mean(g, sigma, b) / np.trace(h) for b in BATCHES]
    np.testing.assert_allclose(rates, expected, rtol=1e-12)
    assert (np.diff(rates) >= -1e-15).all()
    assert Surge.small_batch(g, sigma, h) == (np.inf, np.inf)


@pytest.mark.parametrize("n", [6, 30, 100])
def test_coupled_curvature_has_a_peak_where_the_law_says(n):
    # Noise so large that erf is linear at the peak.
    g, sigma, h = problem(7, n, 2.0)
    lr_max, noise = Surge.small_batch(g, sigma, h)
    rates = np.array([Surge.best(g, sigma, h, b) for b in BATCHES])
    i = rates.argmax()
    assert 0 < i < len(rates) - 1
    assert rates[-1] < 0.95 * rates[i]
    if n == 100:
        assert BATCHES[i] == pytest.approx(noise, rel=0.2)
        assert rates[i] == pytest.approx(lr_max, rel=0.02)
    small = BATCHES[noise / 10 > BATCHES]
    theta = np.array([lr_max, noise])
    np.testing.assert_allclose(
        part.build("law", "surge").obj.predict(theta, {"B": small}), rates[: len(small)], rtol=0.1 if n < 100 else 0.01
    )


def test_form():
    law = part.build("law", "surge").obj
    theta = np.array([0.02, 48.0])
    at = lambda b: law.predict(theta, {"B": np.atleast_1d(b)})
    assert at(48.0)[0] == pytest.approx(0.02, rel=1e-12)
    c = np.array([1.5, 4.0, 30.0])
    np.testing.assert_allclose(at(48 * c), at(48 / c), rtol=1e-12)
    np.testing.assert_allclose(at(c), 0.02 / (0.5 * (np.sqrt(48 / c) + np.sqrt(c / 48))), rtol=1e-12)
    assert at(4e-6)[0] / at(1e-6)[0] == pytest.approx(2, rel=1e-6), "square root far below"
    assert law.optimal(theta, 48.0) == pytest.approx({"lr": 0.02, "of lr_max": 1.0})


def test_sgd():
    law = part.build("law", {"surge": {"rule": "sgd"}}).obj
    g, sigma, h = problem(8, 10, 0.2)
    lr_max, noise = g @ g / (g @ h @ g), np.diag(h) @ sigma**2 / (g @ h @ g)
    exact = [Surge.best_sgd(g, sigma, h, b) for b in BATCHES]
    np.testing.assert_allclose(law.predict(np.array([lr_max, noise]), {"B": BATCHES}), exact, rtol=1e-12)
    rng = np.random.default_rng(0)
    drawn = g + sigma / 4 * rng.standard_normal((60_000, 10))
    square = np.einsum("si,ij,sj->s", drawn, h, drawn)
    assert g @ g / square.mean() == pytest.approx(Surge.best_sgd(g, sigma, h, 16.0), rel=4 * square.std() / square.mean() / 245)


@pytest.mark.parametrize("rule", ["sign", "sgd"])
def test_fit_recovers(rule):
    law = part.build("law", {"surge": {"rule": rule}}).obj
    x = {"B": 2.0 ** np.arange(1, 9)}
    y = law.predict(np.array([4e-3, 30.0]), x)
    np.testing.assert_allclose(laws.fit(law, {**x, "lr": y}, bootstrap=0).values, [4e-3, 30.0], rtol=1e-4)


def test_hyperbola():
    steps, examples = Surge.hyperbola(BATCHES, 300.0, 9000.0)
    np.testing.assert_allclose((steps / 300 - 1) * (examples / 9000 - 1), 1, rtol=1e-9)
    np.testing.assert_allclose(examples, steps * BATCHES)
    balanced, _ = Surge.hyperbola(np.array([30.0]), 300.0, 9000.0)
    assert balanced[0] == pytest.approx(600)
    # The exact model: steps at the best rate are as 1 / fall; with small u they are as 1 + B_noise / B.
    g, sigma, h = problem(9, 200, 2.0)
    noise, batches = Surge.small_batch(g, sigma, h)[1], np.array([1.0, 4.0, 16.0])
    falls = np.array([Surge.decrease(g, sigma, h, b, Surge.best(g, sigma, h, b)) for b in batches])
    wanted = Surge.hyperbola(batches, 1.0, noise)[0]
    np.testing.assert_allclose(falls[0] / falls, wanted / wanted[0], rtol=0.02)
