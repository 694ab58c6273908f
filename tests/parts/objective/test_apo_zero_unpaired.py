"""Oracle of objective/apo-zero-unpaired: the two terms of APO-zero on their own rows. trl's own loss: ``test_kto.py``.

Bugs it is meant to catch: labels exchanged, one weight for both labels, a reference point left in.
"""

import numpy as np
import pytest
import torch

from metier.core import part
from metier.core.batch import Rated
from metier.core.errors import UsageError
from metier.testing import check_part

RNG = np.random.default_rng(2)
LABEL = np.array([True, False, False, True, True])
LOGPS, REF = (-30 * RNG.random(5) for _ in range(2))


def apo(logps=LOGPS, ref=REF, label=LABEL, **options):
    t = [torch.tensor(v, dtype=torch.float64) for v in (logps, ref)]
    batch = Rated(t[0].requires_grad_(), torch.full_like(t[0], 3.0), torch.tensor(label), t[1])
    loss, metrics = part.build("objective", {"apo_zero_unpaired": options}).obj(batch)
    (slope,) = torch.autograd.grad(loss.sum(), t[0])
    return loss.detach().numpy(), slope.numpy(), metrics


def test_contract():
    check_part("objective/apo-zero-unpaired")


@pytest.mark.parametrize(("beta", "good", "bad"), [(0.1, 1.0, 1.0), (0.7, 1.3, 0.4)])
def test_terms_and_slopes(beta, good, bad):
    loss, slope, metrics = apo(beta=beta, desirable_weight=good, undesirable_weight=bad)
    s = 1 / (1 + np.exp(-beta * (LOGPS - REF)))
    np.testing.assert_allclose(loss, np.where(LABEL, good * (1 - s), bad * s), rtol=1e-10)
    np.testing.assert_allclose(slope, beta * s * (1 - s) * np.where(LABEL, -good, bad), rtol=1e-9)
    np.testing.assert_allclose(metrics["reward"].numpy(), beta * (LOGPS - REF), rtol=1e-12)
    np.testing.assert_array_equal(metrics["accuracy"].numpy(), (LOGPS > REF) == LABEL)


def test_start_of_training():
    loss, slope, metrics = apo(ref=LOGPS, beta=0.2)
    np.testing.assert_allclose(loss, 0.5, rtol=1e-12)
    np.testing.assert_allclose(slope, np.where(LABEL, -0.05, 0.05), rtol=1e-12)
    assert metrics["accuracy"].tolist() == [0.5] * 5


def test_two_rows_are_one_pair():
    """A pair split into its rows adds up to the pairwise loss: 1 - σ(R_w) + σ(R_l)."""
    loss, _, _ = apo([-3.0, -9.0], [-4.0, -7.0], np.array([True, False]), beta=0.5)
    assert loss.sum() == pytest.approx(1 - 1 / (1 + np.exp(-0.5)) + 1 / (1 + np.exp(1.0)), rel=1e-12)


def test_bounded():
    loss, slope, _ = apo([0.0, 0.0, -1e4, -1e4], [-1e4, -1e4, 0.0, 0.0], np.array([True, False, True, False]), beta=1.0)
    assert loss.tolist() == [0.0, 1.0, 1.0, 0.0]
    assert not slope.any()


def test_range_of_beta():
    with pytest.raises(UsageError, match="beta"):
        apo(beta=-1.0)
