"""Oracle of objective/apo-zero: equation 7 in float64 numpy, and trl's ``apo_zero``.

Bugs it is meant to catch: signs of either answer, which are the whole difference to apo-down.
"""

import pytest
from _referenced import check_formula, check_like_trl, sig

from metier.testing import check_part


def test_contract():
    check_part("objective/apo-zero")


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_formula_and_gradient(beta):
    def gradients(x):
        return -beta * sig(beta * x.dw) * sig(-beta * x.dw), beta * sig(beta * x.dl) * sig(-beta * x.dl)

    check_formula("apo-zero", lambda x: 1 - sig(beta * x.dw) + sig(beta * x.dl), gradients, beta=beta)


def test_as_trl():
    check_like_trl("apo-zero", "apo_zero", options={"beta": 0.2}, beta=0.2)
