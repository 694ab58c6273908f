"""Oracle of objective/pl-dpo: the Plackett–Luce likelihood by drawing without replacement, in numpy.

Bugs it is meant to catch: ranking upside down, the first answer's own term missing from the denominator, better answers in it.
"""

from itertools import permutations

import numpy as np
import pytest
from _listwise import drawn, scored
from _pairwise import build, of, values

from metier.testing import check_part

LOGPS, REF, SCORE = drawn(7)


def pl_dpo(logps=LOGPS, ref=REF, score=SCORE, **options):
    return scored("pl-dpo", logps, score, ref, **options)


def likelihood(weights, order):
    """Probability of drawing in this order without replacement."""
    left, p = list(order), 1.0
    for k in order:
        p *= weights[k] / sum(weights[i] for i in left)
        left.remove(k)
    return p


def test_contract():
    check_part("objective/pl-dpo")


@pytest.mark.parametrize("beta", [0.1, 0.8])
def test_likelihood_of_the_ranking(beta):
    loss, _, _ = pl_dpo(beta=beta)
    for i in range(3):
        weights = np.exp(beta * (LOGPS[i] - REF[i]))
        assert loss[i] == pytest.approx(-np.log(likelihood(weights, np.argsort(-SCORE[i]))), rel=1e-10)


def test_likelihoods_of_all_rankings_add_up_to_one():
    total = 0.0
    for order in permutations(range(4)):
        score = np.zeros(4)
        score[list(order)] = [4, 3, 2, 1]
        total += np.exp(-pl_dpo(LOGPS[:1], REF[:1], score[None], beta=0.2)[0][0])
    assert total == pytest.approx(1, rel=1e-12)


def test_start_of_training():
    loss, slope, metrics = pl_dpo(ref=LOGPS)
    np.testing.assert_allclose(loss, np.log(24), rtol=1e-12)
    best, worst = SCORE.argmax(1), SCORE.argmin(1)
    np.testing.assert_allclose(slope[range(3), best], -0.1 * 3 / 4, rtol=1e-12)
    np.testing.assert_allclose(slope[range(3), worst], 0.1 * (1 / 4 + 1 / 3 + 1 / 2), rtol=1e-12)
    assert metrics["accuracy"].tolist() == [0.5] * 3


def test_slopes_cancel():
    """Only differences of rewards count."""
    np.testing.assert_allclose(pl_dpo()[1].sum(1), 0, atol=1e-12)


def test_two_answers_are_dpo():
    loss, slope, _ = pl_dpo(LOGPS[:, :2], REF[:, :2], np.tile([1.0, 0.0], (3, 1)), beta=0.3)
    pairs = of(LOGPS[:, 0], LOGPS[:, 1], rw=REF[:, 0], rl=REF[:, 1])
    np.testing.assert_allclose(loss, values(build("dpo", beta=0.3), pairs), rtol=1e-12)
    np.testing.assert_allclose(slope[:, 0], -slope[:, 1], rtol=1e-12)


def test_tied_answers_are_not_set_against_each_other():
    """Two tied best answers above one worse: each against the worse one alone."""
    r = 0.5 * np.array([-1.0, 2.0, 0.5])
    loss, _, _ = pl_dpo([[-1.0, 2.0, 0.5]], [[0.0, 0.0, 0.0]], [[1.0, 1.0, 0.0]], beta=0.5)
    assert loss[0] == pytest.approx(np.log1p(np.exp(r[2] - r[0])) + np.log1p(np.exp(r[2] - r[1])), rel=1e-12)
