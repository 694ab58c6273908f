"""Oracle of objective/dro: ``½ (r - V - τD)²`` with loops in numpy, and the claim that V may be held fixed or not.

Bugs it is meant to catch: V averaged over absent answers, τ missing in V, a sum for a mean, the sign of the log-ratio.
"""

import numpy as np
import pytest
import torch

from metier.core import part
from metier.core.batch import Lists
from metier.testing import check_part

RNG = np.random.default_rng(6)
COUNTS = (4, 2, 3, 1)
ROWS = [(-9 * RNG.random(k), -9 * RNG.random(k), RNG.standard_normal(k)) for k in COUNTS]


def dro(rows=ROWS, **options):
    """Loss, slope by row, metrics. ``rows``: log-probabilities, those of the reference, scores."""
    width = max(len(r[0]) for r in rows)
    logps, ref, score = (torch.tensor(np.stack([np.pad(r[i], (0, width - len(r[i]))) for r in rows])) for i in range(3))
    present = torch.tensor([[k < len(r[0]) for k in range(width)] for r in rows])
    loss, metrics = part.build("objective", {"dro": options}).obj(
        Lists(logps.requires_grad_(), present * 5.0, score, present, ref)
    )
    (slope,) = torch.autograd.grad(loss.sum(), logps)
    return loss.detach().numpy(), [s[: len(r[0])] for s, r in zip(slope.numpy(), rows, strict=True)], metrics


def test_contract():
    check_part("objective/dro")


@pytest.mark.parametrize("tau", [0.1, 1.0, 3.0])
def test_formula_and_gradient_with_v_held_fixed(tau):
    """The slope is ``-τ (r - V - τD) / K``: what the paper's gradient of the policy is, with V a constant."""
    loss, slope, metrics = dro(tau=tau)
    for i, (logps, ref, score) in enumerate(ROWS):
        ratio = logps - ref
        value = sum(r - tau * d for r, d in zip(score, ratio, strict=True)) / len(score)
        residual = score - value - tau * ratio
        assert loss[i] == pytest.approx(sum(residual**2) / 2 / len(score), rel=1e-10, abs=1e-15)
        np.testing.assert_allclose(slope[i], -tau * residual / len(score), rtol=1e-9, atol=1e-14)
        assert metrics["value"][i].item() == pytest.approx(value, rel=1e-10)


def test_v_is_the_best_constant():
    logps, ref, score = ROWS[0]
    residual = score - (logps - ref)
    others = [np.mean((residual - v) ** 2) / 2 for v in np.linspace(-20, 20, 4001)]
    assert dro()[0][0] <= min(others) + 1e-12
    assert dro()[0][0] == pytest.approx(min(others), abs=1e-4)


def test_optimum_is_the_regularised_policy():
    """Zero loss and slope where ``τD = r`` up to a constant of the prompt."""
    score = np.array([0.3, -1.0, 2.0])
    ref = np.array([-5.0, -6.0, -7.0])
    loss, slope, _ = dro([(ref + score / 0.5 + 1.7, ref, score)], tau=0.5)
    assert loss[0] == pytest.approx(0, abs=1e-20)
    np.testing.assert_allclose(slope[0], 0, atol=1e-12)


def test_start_of_training_is_half_the_variance_of_the_scores():
    loss, _, _ = dro([(r[0], r[0], r[2]) for r in ROWS])
    np.testing.assert_allclose(loss, [np.var(r[2]) / 2 for r in ROWS], rtol=1e-12, atol=1e-16)


def test_two_answers_are_ipo():
    """``(Δr - τh)² / 8``: IPO's square with target margin ``Δr / τ``."""
    logps, ref, score = ROWS[1]
    margin = (logps - ref)[0] - (logps - ref)[1]
    assert dro(tau=0.7)[0][1] == pytest.approx((score[0] - score[1] - 0.7 * margin) ** 2 / 8, rel=1e-10)


def test_one_answer_says_nothing():
    loss, slope, _ = dro()
    assert loss[3] == 0
    assert not slope[3].any()
