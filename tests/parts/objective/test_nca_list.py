"""Oracle of objective/nca-list: the NCA formula in numpy loops, as the released code computes it (four answers, batch mean).

Bugs it is meant to catch: 1/K of the padded width, the noise term weighted by q, its sign.
"""

import numpy as np
import pytest
import torch

from metier.core import part
from metier.core.batch import Lists, Pairs
from metier.core.errors import UsageError
from metier.testing import check_part

RNG = np.random.default_rng(9)
LOGPS, REF = (-30 * RNG.random((3, 4)) for _ in range(2))
SCORE = RNG.standard_normal((3, 4))


def nca_list(logps=LOGPS, ref=REF, score=SCORE, **options):
    t = [torch.tensor(v, dtype=torch.float64) for v in (logps, ref, score)]
    batch = Lists(t[0].requires_grad_(), t[0] * 0 + 5, t[2], torch.ones_like(t[0]).bool(), t[1])
    loss, _ = part.build("objective", {"nca_list": options}).obj(batch)
    (slope,) = torch.autograd.grad(loss.sum(), t[0])
    return loss.detach().numpy(), slope.numpy()


def labels(score, alpha):
    e = np.exp((score - score.max(-1, keepdims=True)) / alpha)
    return e / e.sum(-1, keepdims=True)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_contract():
    check_part("objective/nca-list")


@pytest.mark.parametrize(("beta", "alpha"), [(0.01, 0.5), (0.5, 1.0), (0.1, 4.0)])
def test_formula_and_slope(beta, alpha):
    loss, slope = nca_list(beta=beta, alpha=alpha)
    q, r = labels(SCORE, alpha), beta * (LOGPS - REF)
    wanted = [sum(-q[i, k] * np.log(sigmoid(r[i, k])) - np.log(sigmoid(-r[i, k])) / 4 for k in range(4)) for i in range(3)]
    np.testing.assert_allclose(loss, wanted, rtol=1e-9)
    np.testing.assert_allclose(slope, beta * (sigmoid(r) / 4 - q * sigmoid(-r)), rtol=1e-8, atol=1e-15)


def test_start_of_training():
    loss, _ = nca_list(ref=LOGPS, alpha=0.5)
    np.testing.assert_allclose(loss, 2 * np.log(2), rtol=1e-12)


def test_optimum():
    """No slope at ``R = log(K q)``: unlike with InfoNCA a constant added to all rewards matters."""
    q = labels(SCORE, 0.8)
    loss, slope = nca_list(REF + np.log(4 * q) / 0.3, beta=0.3, alpha=0.8)
    np.testing.assert_allclose(slope, 0, atol=1e-14)
    assert (nca_list(REF + np.log(4 * q) / 0.3 + 1, beta=0.3, alpha=0.8)[0] > loss).all()


def test_two_answers_and_a_sharp_label():
    """``-log σ(R_w) - ½ log σ(-R_w) - ½ log σ(-R_l)``: the pairwise loss."""
    loss, _ = nca_list(LOGPS[:, :2], REF[:, :2], np.tile([0.0, 1.0], (3, 1)), beta=0.3)
    low, win = (0.3 * (LOGPS - REF)[:, k] for k in (0, 1))
    wanted = np.log1p(np.exp(-win)) + np.log1p(np.exp(win)) / 2 + np.log1p(np.exp(low)) / 2
    np.testing.assert_allclose(loss, wanted, rtol=1e-10)
    try:
        nca = part.build("objective", {"nca": {"beta": 0.3}}).obj
    except UsageError:
        pytest.skip("objective/nca is not there")
    t = [torch.tensor(v) for v in (LOGPS[:, 1], LOGPS[:, 0], REF[:, 1], REF[:, 0])]
    np.testing.assert_allclose(loss, nca(Pairs(t[0], t[1], t[0], t[1], t[2], t[3]))[0].numpy(), rtol=1e-10)


def test_slope_of_the_best_at_the_start():
    """Two answers: ``-β/4`` for the chosen, ``+β/4`` for the rejected."""
    _, slope = nca_list([[-3.0, -5.0]], [[-3.0, -5.0]], [[1.0, 0.0]], beta=0.2)
    np.testing.assert_allclose(slope, [[-0.05, 0.05]], rtol=1e-12)
