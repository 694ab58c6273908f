"""Oracle of objective/hinge: the hinge in float64 numpy, and trl's ``hinge``.

Bugs it is meant to catch: a margin of 1 nat where ``1/β`` is due, the wrong side cut off.
"""

import numpy as np
import pytest
from _referenced import check_formula, check_like_trl, pairs, slopes, value

from metier.testing import check_part


def test_contract():
    check_part("objective/hinge")


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_formula_and_gradient(beta):
    def gradients(x):
        slope = -beta * (beta * x.h < 1)
        return slope, -slope

    check_formula("hinge", lambda x: np.maximum(0, 1 - beta * x.h), gradients, beta=beta)


def test_pairs_that_lead_by_one_over_beta_are_left_alone():
    b = pairs([9.9, 10.1], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0])
    np.testing.assert_allclose(value("hinge", b), [0.01, 0.0], atol=1e-12)
    np.testing.assert_allclose(slopes("hinge", b)[0], [-0.1, 0.0])


def test_as_trl():
    check_like_trl("hinge", "hinge", options={"beta": 0.3}, beta=0.3)
