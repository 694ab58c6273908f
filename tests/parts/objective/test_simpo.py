"""Oracle of objective/simpo: equation 6 in float64 numpy, the authors' code, trl's.

Bugs it is meant to catch: sums for means, the margin times or over β, lengths of the wrong side, the reference used.
"""

import numpy as np
import pytest
import torch
from _pairwise import build, letters, of, pairs, ref_randomised, sig, slopes, softplus, values

from metier.testing import check_part


def test_contract():
    check_part("objective/simpo")


@pytest.mark.parametrize(("beta", "gamma"), [(2.0, 1.0), (10.0, 3.0), (0.5, 0.0)])
def test_equation_6_and_its_gradient(beta, gamma):
    b, x = pairs(), letters(pairs())
    z = beta * (x.aw - x.al) - gamma
    objective = build("simpo", beta=beta, gamma=gamma)
    np.testing.assert_allclose(values(objective, b), softplus(-z), rtol=1e-12)
    g_w, g_l = slopes(objective, b)
    np.testing.assert_allclose(g_w, -beta * sig(-z) / x.nw, rtol=1e-12)
    np.testing.assert_allclose(g_l, beta * sig(-z) / x.nl, rtol=1e-12)


def test_as_the_authors_code():
    """Recorded from ``simpo_loss`` of princeton-nlp/SimPO 1b3e8f35: β 2.5, ratio γ/β 0.55."""
    b = of([-12.0, -30.5, -7.25, -21.0], [-15.0, -22.5, -9.5, -20.0], [5.0, 12.0, 4.0, 9.0], [6.0, 8.0, 5.0, 10.0])
    expected = [1.40615014, 1.10179447, 1.42983109, 2.31258851]
    np.testing.assert_allclose(values(build("simpo", beta=2.5, gamma=2.5 * 0.55), b), expected, atol=1e-8)


def test_as_trl():
    pytest.importorskip("trl")
    from _pairwise import trl_cpo

    b, x = pairs(), letters(pairs())
    theirs = trl_cpo(torch.tensor(x.aw), torch.tensor(x.al), "simpo", beta=2.5, simpo_gamma=0.7)
    np.testing.assert_allclose(values(build("simpo", beta=2.5, gamma=0.7), b), theirs.numpy(), atol=1e-12)


def test_equal_answers_and_the_default_ratio():
    b = of([-6.0], [-3.0], [4.0], [2.0])
    assert values(build("simpo", gamma=0.3), b)[0] == pytest.approx(np.log(1 + np.exp(0.3)))
    assert values(build("simpo"), b)[0] == pytest.approx(np.log(1 + np.exp(1.0)))


def test_the_reference_is_ignored():
    assert build("simpo").func.__metier__.needs == frozenset()
    np.testing.assert_array_equal(values(build("simpo"), pairs()), values(build("simpo"), ref_randomised(pairs())))


def test_metrics_are_rewards():
    x = letters(pairs())
    metrics = build("simpo", beta=3.0)(pairs())[1]
    np.testing.assert_allclose(metrics["chosen_reward"], 3 * x.aw, rtol=1e-12)
    np.testing.assert_allclose(metrics["margin"], 3 * (x.aw - x.al), rtol=1e-12)
