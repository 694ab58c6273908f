"""Oracle of objective/slic-hf: equation 1 in float64 numpy.

Bugs it is meant to catch: a hinge on the wrong side, λ on the hinge, means for sums, likelihood of the rejected answer.
"""

import numpy as np
import pytest
from _pairwise import build, letters, of, pairs, ref_randomised, slopes, values

from metier.testing import check_part


def test_contract():
    check_part("objective/slic-hf")


@pytest.mark.parametrize(("delta", "lam"), [(1.0, 0.1), (0.0, 0.0), (2.0, 2.0)])
def test_equation_1_and_its_gradient(delta, lam):
    b, x = pairs(), letters(pairs())
    objective = build("slic-hf", delta=delta, lam=lam)
    np.testing.assert_allclose(values(objective, b), np.maximum(0, delta - x.m) - lam * x.lw, rtol=1e-12)
    active = (x.m < delta).astype(float)
    assert 0 < active.mean() < 1
    g_w, g_l = slopes(objective, b)
    np.testing.assert_allclose(g_w, -active - lam)
    np.testing.assert_allclose(g_l, active)


def test_by_hand():
    b = of([-2.0, -2.0, -5.0], [-2.5, -9.0, -4.0])
    loss, metrics = build("slic-hf")(b)
    np.testing.assert_allclose(loss, [0.5 + 0.2, 0.2, 2 + 0.5])
    assert metrics["active"].tolist() == [1.0, 0.0, 1.0]


def test_without_likelihood_it_is_cpos_hinge():
    np.testing.assert_allclose(
        values(build("slic-hf", lam=0.0), pairs()), values(build("cpo", loss="hinge", beta=1.0, c=0.0), pairs()), rtol=1e-14
    )


def test_the_reference_is_ignored():
    np.testing.assert_array_equal(values(build("slic-hf"), pairs()), values(build("slic-hf"), ref_randomised(pairs())))
