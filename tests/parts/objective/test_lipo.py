"""Oracle of objective/lipo: pairs, gains and ranks with loops in numpy.

Bugs it is meant to catch: ranks by score, ranks from 0, gradient through the weights, no signal at the start of training,
log base 2 for the natural one, pairs counted twice.
"""

import numpy as np
import pytest
from _listwise import drawn, scored

from metier.core.errors import UsageError
from metier.testing import check_part

LOGPS, REF, SCORE = drawn(13)


def lipo(logps=LOGPS, ref=REF, score=SCORE, **options):
    return scored("lipo", logps, score, ref, **options)


def by_loops(reward, score, rank):
    loss, slope = 0.0, np.zeros(len(reward))
    for i in range(len(reward)):
        for j in range(len(reward)):
            if score[i] > score[j]:
                weight = (2 ** score[i] - 2 ** score[j]) * abs(1 / np.log(1 + rank[i]) - 1 / np.log(1 + rank[j]))
                d = reward[i] - reward[j]
                loss += weight * np.log1p(np.exp(-d))
                slope[i] -= weight / (1 + np.exp(d))
                slope[j] += weight / (1 + np.exp(d))
    return loss, slope


def ranks(keys):
    return np.argsort(np.argsort(-np.asarray(keys))) + 1


def test_contract():
    check_part("objective/lipo")


@pytest.mark.parametrize("beta", [0.1, 0.7])
def test_formula_and_slope_with_weights_held_fixed(beta):
    loss, slope, _ = lipo(beta=beta)
    for n in range(3):
        reward = beta * (LOGPS[n] - REF[n])
        wanted, up = by_loops(reward, SCORE[n], ranks(reward))
        assert loss[n] == pytest.approx(wanted, rel=1e-10)
        np.testing.assert_allclose(slope[n], beta * up, rtol=1e-9, atol=1e-14)


def test_start_of_training_ranks_by_score():
    """All rewards tie: without an order there would be no weight and no gradient, ever."""
    loss, slope, _ = lipo(ref=LOGPS, beta=0.3)
    for n in range(3):
        wanted, up = by_loops(np.zeros(4), SCORE[n], ranks(SCORE[n]))
        assert loss[n] == pytest.approx(wanted, rel=1e-10)
        np.testing.assert_allclose(slope[n], 0.3 * up, rtol=1e-9)
        assert abs(slope[n]).max() > 1e-3


def test_equal_answers_share_their_places():
    """The first two are the same in reward and score: places 1 and 2 are averaged, and neither is preferred in the gradient."""
    loss, slope, _ = lipo([[0.0, 0.0, -1.0]], [[0.0, 0.0, 0.0]], [[1.0, 1.0, 0.0]], beta=1.0)
    shared = (1 / np.log(2) + 1 / np.log(3)) / 2
    assert loss[0] == pytest.approx(2 * (shared - 1 / np.log(4)) * np.log1p(np.exp(-1.0)), rel=1e-12)
    assert slope[0, 0] == slope[0, 1] < 0 < slope[0, 2]


def test_two_answers_are_weighted_dpo():
    loss, _, _ = lipo([[-3.0, -7.0]], [[-4.0, -5.0]], [[1.0, 0.0]], beta=0.5)
    assert loss[0] == pytest.approx((1 / np.log(2) - 1 / np.log(3)) * np.log1p(np.exp(-1.5)), rel=1e-12)


def test_scores_too_large_for_gains():
    with pytest.raises(UsageError, match="100"):
        lipo(score=SCORE * 0 + 100)
