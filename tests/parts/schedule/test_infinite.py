"""Oracle of schedule/infinite: the paper's four stages in NumPy.

Bugs it is meant to catch: h not normalised, the floor relative to the constant instead of the peak, jumps at the joins,
a dependence on the run's length before the annealing.
"""

import numpy as np
import pytest

from metier.core import part
from metier.core.clock import Clock
from metier.core.schedule import Schedule
from metier.testing import check_part


def curve(steps, warmup=0.0, **options):
    schedule = Schedule(part.build("schedule", {"infinite": options}), warmup=warmup)
    return np.array([schedule.at(Clock(s, steps)) for s in range(steps + 1)])


def test_contract():
    check_part("schedule/infinite")


@pytest.mark.parametrize("shape", ["inverse-sqrt", "cosine"])
def test_formula(shape):
    got = curve(200, cooldown=50, constant=0.4, anneal=0.25, final=0.02, shape=shape, alpha=7.0)
    x, y = np.arange(51) / 50, np.arange(51) / 50
    h = lambda v: 1 / np.sqrt(1 + 7.0 * v) - 1
    down = 1 + (0.4 - 1) * h(x) / h(1) if shape == "inverse-sqrt" else 0.4 + 0.6 / 2 * (1 + np.cos(np.pi * x))
    np.testing.assert_allclose(got[:51], down, rtol=1e-12)
    np.testing.assert_allclose(got[50:151], 0.4, rtol=1e-12)
    np.testing.assert_allclose(got[150:], 0.4 * (0.02 / 0.4) ** y, rtol=1e-12)
    assert (got[0], got[200]) == (1.0, pytest.approx(0.02))


def test_no_length_before_the_annealing():
    np.testing.assert_array_equal(curve(100, cooldown=30, anneal=0.2)[:81], curve(1000, cooldown=30, anneal=0.2)[:81])


def test_fraction_is_of_the_run_after_warmup():
    got = curve(110, warmup=10, cooldown=0.5, anneal=0.0, constant=0.3)
    assert got[10] == 1.0
    assert got[59] > 0.3
    np.testing.assert_allclose(got[60:], 0.3, rtol=1e-12)


def test_an_annealing_that_cuts_the_cooldown_is_continuous():
    got = curve(100, cooldown=200, anneal=0.5)
    assert np.abs(np.diff(got)).max() < 0.06
    assert (np.diff(got) < 0).all()
    assert got[-1] == pytest.approx(0.01)


def test_no_cooldown_is_the_constant_at_once():
    np.testing.assert_allclose(curve(10, cooldown=0.0, anneal=0.0, constant=0.3), 0.3)
