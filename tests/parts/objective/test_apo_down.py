"""Oracle of objective/apo-down: equation 8 in float64 numpy, and trl's ``apo_down``.

Bugs it is meant to catch: the chosen answer pushed up, the margin taken the other way round.
"""

import pytest
from _referenced import check_formula, check_like_trl, sig

from metier.testing import check_part


def test_contract():
    check_part("objective/apo-down")


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_formula_and_gradient(beta):
    def slope(z):
        return beta * sig(z) * sig(-z)

    def gradients(x):
        return slope(beta * x.dw) - slope(beta * x.h), slope(beta * x.h)

    check_formula("apo-down", lambda x: sig(beta * x.dw) + 1 - sig(beta * x.h), gradients, beta=beta)


def test_as_trl():
    check_like_trl("apo-down", "apo_down", options={"beta": 0.2}, beta=0.2)
