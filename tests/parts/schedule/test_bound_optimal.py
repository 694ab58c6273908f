"""Oracle of schedule/bound-optimal: a numerical minimiser (scipy) of the bound in its published form, by double loops.

Bugs it is meant to catch: a recursion with a wrong index, a profile read backwards or squared twice, a peak other than 1,
the entry without an update trained on.
"""

import time

import numpy as np
import pytest
from scipy.optimize import minimize

from metier.core import convexbound, part
from metier.core.clock import Clock
from metier.core.schedule import Schedule
from metier.testing import check_part


def curve(steps, **options):
    at = Schedule(part.build("schedule", {"bound-optimal": options})).at
    return np.array([at(Clock(s, steps)) for s in range(steps)])


def published(eta, g):
    """Theorem 10 term by term, D = 1."""
    total = 1 / (2 * eta.sum()) + (eta**2 * g**2).sum() / (2 * eta.sum())
    for k in range(len(eta) - 1):
        total += eta[k] / (2 * eta[k + 1 :].sum()) * (eta[k:] ** 2 * g[k:] ** 2).sum() / eta[k:].sum()
    return total


def test_contract():
    check_part("schedule/bound-optimal")


@pytest.mark.parametrize("grads", [(1.0,), (3.0, 1.0, 1.5), (1.0, 2.0)])
def test_as_a_numerical_minimum(grads):
    steps = 9
    g = np.interp(np.linspace(0, 1, steps + 1), np.linspace(0, 1, len(grads)), grads) if len(grads) > 1 else np.ones(steps + 1)
    found = minimize(lambda u: np.log(published(np.exp(u), g)), np.full(steps + 1, -1.0), tol=1e-14, options={"gtol": 1e-9})
    best = np.exp(found.x)
    np.testing.assert_allclose(convexbound.minimiser(steps + 1, grads=g), best, rtol=1e-4)
    np.testing.assert_allclose(curve(steps, grads=grads), best[:-1] / best[:-1].max(), rtol=1e-4)


def test_nearly_linear_for_constant_norms():
    got = curve(400)
    np.testing.assert_allclose(got, 1 - np.arange(400) / 400, atol=0.01)
    assert got.max() == got[0] == 1.0


def test_small_where_gradients_are_large():
    got = curve(1000, grads=(4.0, 1.0, 1.0))
    assert got[0] < got[400]
    assert got.argmax() > 300


def test_only_ratios_of_norms_matter():
    np.testing.assert_allclose(curve(50, grads=(2.0, 1.0)), curve(50, grads=(20.0, 10.0)), rtol=1e-12)


def test_long_runs_cost_a_moment():
    at = part.build("schedule", "bound-optimal").obj
    began = time.process_time()
    values = [at(Clock(s, 100_000)) for s in range(0, 100_000, 100)]
    assert time.process_time() - began < 3
    assert np.isfinite(values).all()
    assert at(Clock(100_000, 100_000)) == 0.0
