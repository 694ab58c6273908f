"""Intervals against scipy's and a table's.

Bugs it is meant to catch: half wins that are rounded, a variance over n, a normal quantile for few values.
"""

import numpy as np
import pytest
from scipy.stats import binomtest

from metier.core.intervals import student, wilson


@pytest.mark.parametrize(("wins", "number"), [(0, 10), (7, 10), (10, 10), (731, 1000)])
def test_wilson(wins, number):
    interval = binomtest(wins, number).proportion_ci(method="wilson")
    assert wilson(wins, number) == pytest.approx((interval.low, interval.high), abs=1e-12)


def test_halves_lie_between():
    (a, b), (c, d), (e, f) = (wilson(w, 10) for w in (7, 7.5, 8))
    assert a < c < e
    assert b < d < f


def test_student():
    values = np.array([1.0, 2.0, 4.0])
    half = 4.302652729911275 * values.std(ddof=1) / np.sqrt(3)
    assert student(values) == pytest.approx((7 / 3 - half, 7 / 3 + half))
    assert student(np.array([2.0, 2.0])) == (2.0, 2.0)
