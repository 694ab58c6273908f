"""Oracle of objective/cpo: its three pair terms in float64 numpy, trl's, and the losses it reduces to.

Bugs it is meant to catch: means for sums (or the reverse for ``ipo``), the likelihood of the rejected answer, β in ``ipo``.
"""

import numpy as np
import pytest
import torch
from _pairwise import build, letters, of, pairs, ref_randomised, sig, slopes, softplus, trl_cpo, values

from metier.testing import check_part


def test_contract():
    check_part("objective/cpo")


def expected(x, loss, beta):
    if loss == "ipo":
        error = x.aw - x.al - 1 / (2 * beta)
        return error**2, 2 * error / x.nw, -2 * error / x.nl
    if loss == "hinge":
        active = (beta * x.m < 1) * beta
        return np.maximum(0, 1 - beta * x.m), -active, active
    return softplus(-beta * x.m), -beta * sig(-beta * x.m), beta * sig(-beta * x.m)


@pytest.mark.parametrize("loss", ["sigmoid", "hinge", "ipo"])
@pytest.mark.parametrize(("beta", "c"), [(0.1, 1.0), (0.5, 0.0), (0.3, 2.5)])
def test_formulas_and_gradients(loss, beta, c):
    b, x = pairs(), letters(pairs())
    pair, d_w, d_l = expected(x, loss, beta)
    objective = build("cpo", loss=loss, beta=beta, c=c)
    np.testing.assert_allclose(values(objective, b), pair - c * x.aw, rtol=1e-12)
    g_w, g_l = slopes(objective, b)
    np.testing.assert_allclose(g_w, d_w - c / x.nw, rtol=1e-12)
    np.testing.assert_allclose(g_l, d_l, rtol=1e-12)


@pytest.mark.parametrize("loss", ["sigmoid", "hinge", "ipo"])
def test_pair_term_as_trl(loss):
    pytest.importorskip("trl")
    x = letters(pairs())
    scores = (x.aw, x.al) if loss == "ipo" else (x.lw, x.ll)  # trl averages for ipo
    theirs = trl_cpo(*map(torch.tensor, scores), loss, beta=0.3)
    np.testing.assert_allclose(values(build("cpo", loss=loss, beta=0.3, c=0.0), pairs()), theirs.numpy(), atol=1e-12)


def test_reductions():
    np.testing.assert_allclose(
        values(build("cpo", beta=1.0, c=0.0), pairs()), values(build("typo", lam=0.0), pairs()), rtol=1e-14
    )
    np.testing.assert_allclose(
        values(build("cpo", beta=0.2, c=0.0), pairs()), values(build("refdpo", reward="posterior", beta=0.2), pairs()), rtol=1e-14
    )


def test_equal_answers():
    b = of([-6.0], [-6.0], [3.0], [4.0])
    assert values(build("cpo"), b)[0] == pytest.approx(np.log(2) + 2.0)
    assert values(build("cpo", loss="hinge"), b)[0] == pytest.approx(1 + 2.0)


def test_the_reference_is_ignored():
    np.testing.assert_array_equal(values(build("cpo"), pairs()), values(build("cpo"), ref_randomised(pairs())))
