"""Oracle of objective/alphapo: the reward written out in float64 numpy, SimPO as its limit, trl's.

Bugs it is meant to catch: the sign of α, a missing 1/α, cancellation at small α, sums for means, overflow.
"""

import numpy as np
import pytest
import torch
from _pairwise import build, letters, of, pairs, ref_randomised, sig, slopes, softplus, values

from metier.testing import check_part


def test_contract():
    check_part("objective/alphapo")


@pytest.mark.parametrize("alpha", [-1.0, -0.1, 0.25, 1.5])
def test_formula_and_its_gradient(alpha):
    b, x = pairs(), letters(pairs())
    reward = lambda a: (1 - np.exp(a) ** -alpha) / alpha
    z = 2.0 * (reward(x.aw) - reward(x.al)) - 0.5
    objective = build("alphapo", alpha=alpha, beta=2.0, gamma=0.5)
    np.testing.assert_allclose(values(objective, b), softplus(-z), rtol=1e-10)
    g_w, g_l = slopes(objective, b)
    np.testing.assert_allclose(g_w, -2 * sig(-z) * np.exp(-alpha * x.aw) / x.nw, rtol=1e-10)
    np.testing.assert_allclose(g_l, 2 * sig(-z) * np.exp(-alpha * x.al) / x.nl, rtol=1e-10)


def test_simpo_is_the_limit():
    expected = values(build("simpo", beta=2.0, gamma=0.5), pairs())
    np.testing.assert_allclose(values(build("alphapo", alpha=0.0, beta=2.0, gamma=0.5), pairs()), expected, rtol=1e-14)
    for alpha in (1e-12, -1e-12):
        np.testing.assert_allclose(values(build("alphapo", alpha=alpha, beta=2.0, gamma=0.5), pairs()), expected, rtol=1e-9)


@pytest.mark.parametrize("alpha", [-0.5, 0.25])
def test_as_trl(alpha):
    pytest.importorskip("trl")
    from _pairwise import trl_cpo

    x = letters(pairs())
    theirs = trl_cpo(torch.tensor(x.aw), torch.tensor(x.al), "simpo", beta=2.5, simpo_gamma=0.7, alpha=alpha)
    np.testing.assert_allclose(values(build("alphapo", alpha=alpha, beta=2.5, gamma=0.7), pairs()), theirs.numpy(), atol=1e-12)


def test_bounds_of_the_reward():
    """α < 0: the reward is at least 1/α, whatever the answer; α > 0: what is far too unlikely is held."""
    far = of([-1.0], [-1e4])
    assert build("alphapo", alpha=-0.5, beta=1.0)(far)[1]["rejected_reward"].item() == pytest.approx(-2.0)
    loss = values(build("alphapo", alpha=0.25), of([-1e4], [-1.0]))
    assert np.isfinite(loss).all()
    assert loss[0] > 1e20


def test_the_reference_is_ignored():
    np.testing.assert_array_equal(values(build("alphapo"), pairs()), values(build("alphapo"), ref_randomised(pairs())))
