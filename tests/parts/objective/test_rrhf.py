"""Oracle of objective/rrhf: the equations with loops in numpy.

Bugs it is meant to catch: pairs counted twice or in the wrong direction, sums for token means, the likelihood of another answer.
"""

import numpy as np
import pytest
from _listwise import scored

from metier.testing import check_part

RNG = np.random.default_rng(12)
LOGPS, LENGTH, SCORE = -30 * RNG.random((3, 4)), RNG.integers(2, 9, (3, 4)).astype(float), RNG.standard_normal((3, 4))


def rrhf(logps=LOGPS, length=LENGTH, score=SCORE, **options):
    return scored("rrhf", logps, score, length=length, **options)


def test_contract():
    check_part("objective/rrhf")


@pytest.mark.parametrize(("weight", "sft"), [(1.0, "sum"), (0.3, "mean"), (0.0, "sum")])
def test_equations(weight, sft):
    loss, slope, _ = rrhf(sft_weight=weight, sft=sft)
    for n in range(3):
        p, r, top = LOGPS[n] / LENGTH[n], SCORE[n], SCORE[n].argmax()
        rank, up = 0.0, np.zeros(4)
        for i in range(4):
            for j in range(4):
                if r[i] < r[j] and p[i] > p[j]:
                    rank += p[i] - p[j]
                    up[i] += 1 / LENGTH[n][i]
                    up[j] -= 1 / LENGTH[n][j]
        up[top] -= weight / (1 if sft == "sum" else LENGTH[n][top])
        assert loss[n] == pytest.approx(rank - weight * (LOGPS[n][top] if sft == "sum" else p[top]), rel=1e-12)
        np.testing.assert_allclose(slope[n], up, rtol=1e-12, atol=1e-15)


def test_right_order_has_only_the_likelihood():
    loss, slope, metrics = rrhf([[-1.0, -4.0, -9.0]], [[1.0, 2.0, 3.0]], [[3.0, 2.0, 1.0]])
    assert loss.tolist() == [1.0]
    assert slope.tolist() == [[-1.0, 0.0, 0.0]]
    assert metrics["accuracy"].tolist() == [1.0]


def test_by_hand():
    """Means -3, -1, -2 in falling score: (2 over 1) 2, (3 over 1) 1, and 3 against 2 is right; likelihood 6."""
    assert rrhf([[-6.0, -1.0, -4.0]], [[2.0, 1.0, 2.0]], [[3.0, 2.0, 1.0]])[0].tolist() == [9.0]


def test_tied_best_answers_share_the_likelihood():
    assert rrhf([[-6.0, -2.0, -9.0]], [[2.0, 1.0, 1.0]], [[3.0, 3.0, 1.0]])[0].tolist() == [4.0]


def test_as_the_authors_code():
    """Recorded from ``rrhf_loss`` of GanjinZero/RRHF 026adca7 on three answers of 3, 2 and 4 tokens, with the best one's sum added."""
    loss, _, _ = rrhf([[-3.5, -0.6, -6.0]], [[3.0, 2.0, 4.0]], [[0.7, -0.1, 0.3]])
    assert loss[0] == pytest.approx(2.06666667 + 3.5, abs=1e-8)
