"""Natural evolution strategies against closed forms of the Gaussian-smoothed objective."""

import numpy as np
import pytest

from metier.core.errors import MetierError, UsageError
from metier.core.evolution import Evolution, Settings, estimate, perturbations, shaped


def values(noise, mean, sigma, objective):
    return np.array([[objective(mean + sigma * e), objective(mean - sigma * e)] for e in noise])


def quadratic(seed=0, d=5):
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(d, d))
    a, b, at = a @ a.T, rng.normal(size=d), rng.normal(size=d)
    return (lambda x: 0.5 * x @ a @ x + b @ x), at, a @ at + b


def test_the_estimate_is_unbiased_on_a_quadratic():
    objective, at, gradient = quadratic()
    noise = perturbations(5, 20_000, seed=1, iteration=0)
    x = values(noise, at, 0.3, objective)
    each = (x[:, :1] - x[:, 1:]) / (2 * 0.3) * noise
    error = each.std(axis=0) / np.sqrt(len(noise))
    got = estimate(noise, x, 0.3)
    assert (np.abs(got - gradient) < 4 * error).all()
    assert (np.abs(gradient) > 10 * error).any()
    np.testing.assert_allclose(got, each.mean(axis=0), rtol=1e-10)


def test_with_orthogonal_directions_it_is_exact_on_a_quadratic():
    objective, at, gradient = quadratic(1)
    q = np.linalg.qr(np.random.default_rng(2).normal(size=(5, 5)))[0] * np.sqrt(5)
    np.testing.assert_allclose(estimate(q, values(q, at, 0.7, objective), 0.7), gradient, rtol=1e-10)


def test_it_is_the_gradient_of_the_smoothed_objective():
    """E (x + σε)³ = x³ + 3 x σ²: its gradient is 3 x² + 3 σ², not 3 x²."""
    noise = perturbations(1, 40_000, seed=3, iteration=0)
    got = estimate(noise, values(noise, np.array([1.0]), 0.8, lambda x: float(x[0] ** 3)), 0.8)
    assert got[0] == pytest.approx(3 + 3 * 0.64, rel=0.05)


def test_perturbations_are_a_function_of_seed_and_iteration():
    one = perturbations(6, 3, seed=4, iteration=2)
    np.testing.assert_array_equal(one, perturbations(6, 3, seed=4, iteration=2))
    for other in (perturbations(6, 3, seed=5, iteration=2), perturbations(6, 3, seed=4, iteration=3)):
        assert np.abs(one - other).min() > 1e-6
    assert one.shape == (3, 6)


@pytest.mark.parametrize(
    ("how", "given", "wanted"),
    [
        ("rank", [[3.0, 1.0], [2.0, 9.0]], [[1 / 6, -1 / 2], [-1 / 6, 1 / 2]]),
        ("rank", [[1.0, 1.0], [0.0, np.nan]], [[0, 0], [-1 / 2, 1 / 2]]),
        ("rank", [[np.inf, 1.0], [0.0, np.nan]], [[1 / 3, -1 / 6], [-1 / 2, 1 / 3]]),
        ("z", [[1.0, -1.0], [1.0, -1.0]], [[1, -1], [1, -1]]),
        ("z", [[5.0, 1.0], [5.0, 1.0]], [[1, -1], [1, -1]]),
        ("z", [[2.0, 2.0], [2.0, 2.0]], [[0, 0], [0, 0]]),
        ("z", [[1.0, -1.0], [np.inf, -1.0]], [[1, -1], [1, -1]]),
        ("none", [[5.0, 7.0], [np.nan, 1.0]], [[5, 7], [7, 1]]),
        ("rank", [[np.nan, np.inf]], [[0, 0]]),
        ("rank", [[2.0]], [[-0.5]]),
    ],
)
def test_shaping(how, given, wanted):
    np.testing.assert_allclose(shaped(given, how), wanted, atol=1e-12)


def test_adam_on_the_estimate():
    settings = Settings(sigma=0.2, pairs=4, lr=0.03, shaping="none", beta1=0.8, beta2=0.9, seed=6)
    objective, at, _ = quadratic(3)
    search = Evolution(at, settings)
    p, m, v = at.copy(), 0.0, 0.0
    for t in range(1, 5):
        asked = search.ask()
        noise = perturbations(5, 4, seed=6, iteration=t - 1)
        np.testing.assert_allclose(asked[:, 0], p + 0.2 * noise, rtol=1e-12)
        np.testing.assert_allclose(asked[:, 1], p - 0.2 * noise, rtol=1e-12)
        x = [[objective(c) for c in pair] for pair in asked]
        g = sum((a - b) * e for (a, b), e in zip(x, noise, strict=True)) / (2 * 4 * 0.2)
        np.testing.assert_allclose(search.tell(x), g, rtol=1e-10)
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
        p = p - 0.03 * (m / (1 - 0.8**t)) / (np.sqrt(v / (1 - 0.9**t)) + 1e-8)
        np.testing.assert_allclose(search.mean, p, rtol=1e-10)


@pytest.mark.parametrize("shaping", ["rank", "z", "none"])
def test_it_finds_a_minimum_and_resumes_to_the_bit(shaping):
    target = np.linspace(-1, 1, 8)

    def run(search, iterations):
        while search.iteration < iterations:
            search.tell([[float(((c - target) ** 2).sum()) for c in pair] for pair in search.ask()])
        return search

    settings = Settings(sigma=0.1, pairs=8, lr=0.05, shaping=shaping)
    whole = run(Evolution(np.zeros(8), settings), 120)
    assert np.abs(whole.mean - target).max() < 0.15
    first = run(Evolution(np.zeros(8), settings), 50)
    kept = first.state_dict()
    run(first, 60)
    second = Evolution(np.zeros(8), settings)
    second.load_state_dict(kept)
    np.testing.assert_array_equal(run(second, 120).mean, whole.mean)


def test_values_that_are_all_infinite_move_nothing():
    search = Evolution(np.ones(3), Settings(pairs=2))
    search.tell(np.full((2, 2), np.inf))
    np.testing.assert_array_equal(search.mean, np.ones(3))


@pytest.mark.parametrize(
    "wrong", [{"sigma": 0.0}, {"pairs": 0}, {"lr": -1.0}, {"beta1": 1.0}, {"shaping": "ranks"}, {"sigma": float("nan")}]
)
def test_settings_that_make_no_sense(wrong):
    with pytest.raises(UsageError, match=next(iter(wrong)).removesuffix("1")):
        Settings(**wrong)


def test_values_and_states_of_another_size():
    search = Evolution(np.ones(3), Settings(pairs=2))
    with pytest.raises(MetierError, match=r"\[2, 2\]"):
        search.tell(np.ones((3, 2)))
    with pytest.raises(MetierError, match="4 numbers"):
        search.load_state_dict(Evolution(np.ones(4), Settings()).state_dict())
