"""Oracle of objective/infonca: cross-entropy with soft labels in numpy, as the released code computes it (four answers).

Bugs it is meant to catch: α multiplied instead of divided, q and p exchanged, β on q.
"""

import numpy as np
import pytest
from _listwise import drawn, scored, softmax
from _pairwise import build, of, values

from metier.testing import check_part

LOGPS, REF, SCORE = drawn(8)


def infonca(logps=LOGPS, ref=REF, score=SCORE, **options):
    return scored("infonca", logps, score, ref, **options)[:2]


def test_contract():
    check_part("objective/infonca")


@pytest.mark.parametrize(("beta", "alpha"), [(0.01, 0.5), (0.5, 1.0), (0.1, 4.0)])
def test_cross_entropy_and_slope(beta, alpha):
    loss, slope = infonca(beta=beta, alpha=alpha)
    p, q = softmax(beta * (LOGPS - REF)), softmax(SCORE / alpha)
    np.testing.assert_allclose(loss, -(q * np.log(p)).sum(1), rtol=1e-10)
    np.testing.assert_allclose(slope, beta * (p - q), rtol=1e-8, atol=1e-15)


def test_start_of_training():
    loss, slope = infonca(ref=LOGPS, beta=0.2, alpha=0.5)
    np.testing.assert_allclose(loss, np.log(4), rtol=1e-12)
    np.testing.assert_allclose(slope, 0.2 * (1 / 4 - softmax(SCORE / 0.5)), rtol=1e-10)


def test_optimum():
    """Lowest where the rewards are the scores over α up to a constant: the entropy of q, no slope."""
    q = softmax(SCORE / 0.5)
    loss, slope = infonca(REF + SCORE / 0.5 / 0.2 + 3, beta=0.2, alpha=0.5)
    np.testing.assert_allclose(loss, -(q * np.log(q)).sum(1), rtol=1e-10)
    np.testing.assert_allclose(slope, 0, atol=1e-12)


def test_two_answers_and_a_sharp_label_are_dpo():
    loss, _ = infonca(LOGPS[:, :2], REF[:, :2], np.tile([0.0, 1.0], (3, 1)), beta=0.3)
    pairs = of(LOGPS[:, 1], LOGPS[:, 0], rw=REF[:, 1], rl=REF[:, 0])
    np.testing.assert_allclose(loss, values(build("dpo", beta=0.3), pairs), rtol=1e-12)


def test_tied_best_answers_share_the_label():
    loss, _ = infonca([[0.0, 0.0, 0.0]], [[0.0, 1.0, 2.0]], [[5.0, 5.0, 1.0]], beta=1.0)
    p = softmax(np.array([0.0, -1.0, -2.0]))
    assert loss[0] == pytest.approx(-(np.log(p[0]) + np.log(p[1])) / 2, rel=1e-12)
