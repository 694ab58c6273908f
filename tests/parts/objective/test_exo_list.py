"""Oracle of objective/exo-list: the divergence in numpy with explicit sums.

Bugs it is meant to catch: the forward divergence, β_r multiplied, entropy forgotten.
"""

import numpy as np
import pytest
from _listwise import drawn, scored, softmax
from _pairwise import build, of, values

from metier.testing import check_part

LOGPS, REF, SCORE = drawn(10)


def exo_list(logps=LOGPS, ref=REF, score=SCORE, **options):
    return scored("exo-list", logps, score, ref, **options)[:2]


def test_contract():
    check_part("objective/exo-list")


@pytest.mark.parametrize(("beta", "beta_r"), [(0.1, 0.5), (0.5, 1.0), (0.02, 3.0)])
def test_divergence_and_slope(beta, beta_r):
    loss, slope = exo_list(beta=beta, beta_r=beta_r)
    p, q = softmax(beta * (LOGPS - REF)), softmax(SCORE / beta_r)
    wanted = (p * (np.log(p) - np.log(q))).sum(1)
    np.testing.assert_allclose(loss, wanted, rtol=1e-9)
    np.testing.assert_allclose(slope, beta * p * (np.log(p / q) - wanted[:, None]), rtol=1e-7, atol=1e-14)


def test_zero_where_both_agree():
    loss, slope = exo_list(REF + SCORE / 0.4 / 0.2 - 7, beta=0.2, beta_r=0.4)
    np.testing.assert_allclose(loss, 0, atol=1e-12)
    np.testing.assert_allclose(slope, 0, atol=1e-12)


def test_two_answers():
    """Scores with ``q = (1-ε, ε)``: the pairwise loss, 2.7612 at the start with ``ε = 1e-3``."""
    score = np.tile([0.1 * np.log((1 - 1e-3) / 1e-3), 0.0], (3, 1))
    assert exo_list(LOGPS[:, :2], LOGPS[:, :2], score)[0] == pytest.approx([2.7612] * 3, abs=5e-5)
    loss, slope = exo_list(LOGPS[:, :2], REF[:, :2], score, beta=0.2)
    z = 0.2 * ((LOGPS - REF)[:, 0] - (LOGPS - REF)[:, 1])
    s = 1 / (1 + np.exp(-z))
    np.testing.assert_allclose(slope[:, 0], 0.2 * s * (1 - s) * (z - np.log(999)), rtol=1e-7)
    pairs = of(LOGPS[:, 0], LOGPS[:, 1], rw=REF[:, 0], rl=REF[:, 1])
    np.testing.assert_allclose(loss, values(build("exo", beta=0.2), pairs), rtol=1e-9)
