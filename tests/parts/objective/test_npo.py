"""Oracle of objective/npo: ``(2/β) log(1 + (π/π_ref)^β)`` in float64 numpy, and its limit, gradient ascent.

Bugs it is meant to catch: the sign, desirable rows unlearned too, β missing outside the logarithm, a retain term summed over tokens.
"""

import numpy as np
import pytest
import torch

from metier.core import part
from metier.core.batch import Rated
from metier.core.errors import UsageError
from metier.testing import check_part

RNG = np.random.default_rng(5)
LABEL = np.array([False, True, False, True, False])
LENGTH = np.array([3.0, 4.0, 2.0, 0.0, 7.0])
LOGPS, REF = (-30 * RNG.random(5) for _ in range(2))


def npo(logps=LOGPS, ref=REF, label=LABEL, **options):
    t = [torch.tensor(v, dtype=torch.float64) for v in (logps, ref, LENGTH[: len(logps)])]
    batch = Rated(t[0].requires_grad_(), t[2], torch.tensor(label), t[1])
    loss, metrics = part.build("objective", {"npo": options}).obj(batch)
    (slope,) = torch.autograd.grad(loss.sum(), t[0])
    return loss.detach().numpy(), slope.numpy(), metrics


def test_contract():
    check_part("objective/npo")


@pytest.mark.parametrize("beta", [0.05, 0.1, 1.5])
def test_formula_and_slope(beta):
    loss, slope, metrics = npo(beta=beta)
    u = np.exp(LOGPS - REF)
    np.testing.assert_allclose(loss, np.where(LABEL, 0.0, 2 / beta * np.log1p(u**beta)), rtol=1e-10)
    np.testing.assert_allclose(slope, np.where(LABEL, 0.0, 2 * u**beta / (1 + u**beta)), rtol=1e-10)
    np.testing.assert_array_equal(metrics["accuracy"].numpy(), (LOGPS > REF) == LABEL)


def test_start_of_training():
    loss, slope, _ = npo(ref=LOGPS, beta=0.1)
    np.testing.assert_allclose(loss[~LABEL], 20 * np.log(2), rtol=1e-12)
    np.testing.assert_allclose(slope[~LABEL], 1.0, rtol=1e-12)


def test_small_beta_is_gradient_ascent():
    loss, slope, _ = npo(beta=1e-6)
    np.testing.assert_allclose(slope[~LABEL], 1.0, atol=1e-4)
    np.testing.assert_allclose((loss - 2e6 * np.log(2))[~LABEL], (LOGPS - REF)[~LABEL], atol=1e-3)


def test_bounded_below():
    loss, slope, _ = npo([-1e4, 0.0], [0.0, -1e4], np.array([False, False]), beta=1.0)
    np.testing.assert_allclose(loss, [0.0, 2e4])
    np.testing.assert_allclose(slope, [0.0, 2.0])


def test_retained_answers():
    """Desirable rows: token mean, an empty answer gives nothing; undesirable rows are as without."""
    loss, slope, _ = npo(retain_weight=0.5)
    np.testing.assert_allclose(loss[1], -0.5 * LOGPS[1] / 4, rtol=1e-12)
    np.testing.assert_allclose(slope[1], -0.5 / 4, rtol=1e-12)
    np.testing.assert_array_equal(loss[~LABEL], npo()[0][~LABEL])


def test_ranges():
    with pytest.raises(UsageError, match="retain_weight"):
        npo(retain_weight=-1.0)
    with pytest.raises(UsageError, match="beta"):
        npo(beta=0.0)


def test_as_the_authors_code():
    """Recorded from ``compute_loss``, branch ``npo``, of licong-lin/negative-preference-optimization 9e5f646b, β 0.1; sums over tokens."""
    loss, _, _ = npo(REF[:3] + np.array([-1.0, 2.5, 0.3]), REF[:3], np.array([False] * 3), beta=0.1)
    np.testing.assert_allclose(loss, [12.88793320, 16.51878840, 14.16519353], atol=1e-7)
