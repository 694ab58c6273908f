"""Oracle of objective/pro: the equations with loops over sorted answers in numpy; the released loss on one list.

Bugs it is meant to catch: sums for token means, the positive scaled by the smallest gap, ascending order, the positive missing
from the denominator, the fine-tuning term of another answer or with another weight.
"""

import numpy as np
import pytest
from _listwise import scored

from metier.core.errors import UsageError
from metier.testing import check_part

RNG = np.random.default_rng(11)
LOGPS, LENGTH, SCORE = -30 * RNG.random((3, 4)), RNG.integers(2, 9, (3, 4)).astype(float), 2 * RNG.random((3, 4))


def pro(logps=LOGPS, length=LENGTH, score=SCORE, **options):
    return scored("pro", logps, score, length=length, **options)


def by_the_paper(logps, length, score, temperatures, weight=0.05, mean=False):
    order = np.argsort(-score)
    s, r = (logps / length)[order], score[order]
    loss = 0.0
    for k in range(len(s) - 1):
        t = [1 / (r[k] - r[i]) if temperatures else 1.0 for i in range(k + 1, len(s))]
        up = np.exp(s[k] / min(t))
        loss -= np.log(up / (up + sum(np.exp(s[i] / t[i - k - 1]) for i in range(k + 1, len(s)))))
    return loss - weight * (len(s) - 1) ** 2 * (s[0] if mean else logps[order[0]])


def test_contract():
    check_part("objective/pro")


@pytest.mark.parametrize("temperatures", [True, False])
@pytest.mark.parametrize(("weight", "sft"), [(0.05, "sum"), (0.3, "mean"), (0.0, "sum")])
def test_equations(temperatures, weight, sft):
    loss, _, _ = pro(temperatures=temperatures, sft_weight=weight, sft=sft)
    wanted = [by_the_paper(LOGPS[i], LENGTH[i], SCORE[i], temperatures, weight, sft == "mean") for i in range(3)]
    np.testing.assert_allclose(loss, wanted, rtol=1e-10)


def test_two_answers():
    """``-log σ(g (a_1 - a_2))`` with the reward gap as the only strength."""
    a = (LOGPS / LENGTH)[:, :2]
    gap = np.abs(SCORE[:, 0] - SCORE[:, 1])
    sign = np.sign(SCORE[:, 0] - SCORE[:, 1])
    loss, _, _ = pro(LOGPS[:, :2], LENGTH[:, :2], SCORE[:, :2], sft_weight=0.0)
    np.testing.assert_allclose(loss, np.log1p(np.exp(-gap * sign * (a[:, 0] - a[:, 1]))), rtol=1e-10)


def test_plain_is_plackett_luce_on_token_means():
    wanted, _, _ = scored("pl-dpo", LOGPS / LENGTH, SCORE, 0 * LOGPS, beta=1.0)
    np.testing.assert_allclose(pro(temperatures=False, sft_weight=0.0)[0], wanted, rtol=1e-12)


@pytest.mark.parametrize("temperatures", [True, False])
def test_signs(temperatures):
    """Never below zero; up for the best answer, down for the worst."""
    loss, slope, _ = pro(temperatures=temperatures, sft_weight=0.0)
    assert (loss >= 0).all()
    assert (slope[range(3), SCORE.argmax(1)] < 0).all()
    assert (slope[range(3), SCORE.argmin(1)] > 0).all()


def test_shift_of_the_rewards():
    np.testing.assert_allclose(pro()[0], pro(score=SCORE - 5)[0], rtol=1e-10)


def test_ties():
    """Of two tied best answers each is set against the worst alone; they share the fine-tuning term. Released code would add a
    constant 1 to the first denominator."""
    loss, _, _ = pro([[-4.0, -9.0, -6.0]], [[2.0, 3.0, 4.0]], [[1.0, 1.0, 0.5]])
    a = np.array([-2.0, -3.0, -1.5]) * 0.5
    pairs = np.log1p(np.exp(a[2] - a[0])) + np.log1p(np.exp(a[2] - a[1]))
    assert loss[0] == pytest.approx(pairs + 0.05 * 4 * (4.0 + 9.0) / 2, rel=1e-12)
    again, _, _ = pro([[-9.0, -6.0, -4.0]], [[3.0, 4.0, 2.0]], [[1.0, 0.5, 1.0]])
    assert loss[0] == pytest.approx(again[0], rel=1e-14)


def test_large_rewards_do_not_overflow():
    loss, slope, _ = pro(score=SCORE * 1e4)
    assert np.isfinite(loss).all()
    assert np.isfinite(slope).all()


def test_as_the_released_code_writes_it():
    """Three answers in order, worked out by hand from ``compute_loss`` (its ``eps`` of 1e-10 is below these digits):
    means -1, -2, -1.5, rewards 2, 1, 0. First step: gaps 1 and 2, positive by 2: log(e^-2 + e^-2 + e^-3) + 2; second: gap 1:
    log(e^-2 + e^-1.5) + 2; fine-tuning 0.05 * 4 * 3."""
    loss, _, _ = pro([[-3.0, -4.0, -3.0]], [[3.0, 2.0, 2.0]], [[2.0, 1.0, 0.0]])
    assert loss[0] == pytest.approx(0.86199480 + 0.97407698 + 0.6, abs=2e-8)


def test_ranges():
    with pytest.raises(UsageError, match="sft"):
        pro(sft="total")
    with pytest.raises(UsageError, match="sft_weight"):
        pro(sft_weight=-0.1)
