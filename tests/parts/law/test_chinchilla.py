"""Oracle of law/chinchilla: the published constants, the formula in plain arithmetic, the optimum by brute
force.

Bugs it is meant to catch: alpha and beta exchanged, A and B exchanged, log and linear parameters confused, an
optimum with the exponents the wrong way round, 6 forgotten.
"""

import numpy as np
import pytest

from metier.core import laws, part
from metier.testing import check_part

PAPER = np.array([1.69, 406.4, 410.7, 0.34, 0.28])


@pytest.fixture
def law():
    return part.build("law", "chinchilla").obj


@pytest.fixture
def grid():
    n, d = np.meshgrid(np.logspace(7.5, 10.2, 7), np.logspace(9, 11.5, 6))
    return {"N": n.ravel(), "D": d.ravel()}


def formula(theta, n, d):
    e, a, b, alpha, beta = theta
    return e + a / n**alpha + b / d**beta


def test_contract():
    check_part("law/chinchilla")


def test_prediction(law, grid):
    np.testing.assert_allclose(law.predict(PAPER, grid), formula(PAPER, grid["N"], grid["D"]), rtol=1e-12)
    chinchilla = law.predict(PAPER, {"N": np.array([70e9]), "D": np.array([1.4e12])})
    assert chinchilla[0] == pytest.approx(1.9366, abs=1e-3)


@pytest.mark.parametrize("theta", [PAPER, [0.5, 20.0, 3000.0, 0.2, 0.5], [2.5, 1e4, 50.0, 0.6, 0.15]])
def test_known_parameters_are_recovered(law, grid, theta):
    found = laws.fit(law, {**grid, "loss": formula(theta, grid["N"], grid["D"])}, bootstrap=0)
    np.testing.assert_allclose(found.values, theta, rtol=1e-5)
    assert not found.at_bound


def test_recovered_within_its_intervals_from_noise(law, grid):
    rng = np.random.default_rng(1)
    loss = formula(PAPER, grid["N"], grid["D"]) * np.exp(0.003 * rng.standard_normal(len(grid["N"])))
    found = laws.fit(law, {**grid, "loss": loss}, bootstrap=60)
    assert all(low <= v <= high for low, v, high in zip(found.low, PAPER, found.high, strict=True))
    assert found.high[3] - found.low[3] < 0.1


def test_a_few_wrong_runs_do_not_matter(law, grid):
    loss = formula(PAPER, grid["N"], grid["D"])
    loss[[3, 17, 30]] *= 1.5
    found = laws.fit(law, {**grid, "loss": loss}, bootstrap=0)
    np.testing.assert_allclose(found.values, PAPER, rtol=2e-2)


def test_optimum_is_the_minimum_along_the_budget(law):
    for flops in (1e19, 5.76e23):
        got = law.optimal(PAPER, flops)
        assert 6 * got["N"] * got["D"] == pytest.approx(flops)
        n = got["N"] * np.linspace(0.5, 2, 100_001)
        along = formula(PAPER, n, flops / 6 / n)
        assert n[along.argmin()] == pytest.approx(got["N"], rel=1e-3)
        assert got["loss"] == pytest.approx(along.min())
