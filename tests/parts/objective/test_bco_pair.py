"""Oracle of objective/bco-pair: two binary cross-entropies in float64 numpy, and trl's ``bco_pair``.

Bugs it is meant to catch: the difference of rewards in one logistic (which is dpo), a sign, a mean for the sum.
"""

import numpy as np
import pytest
from _referenced import check_formula, check_like_trl, nls, random_pairs, sig, value

from metier.testing import check_part


def test_contract():
    check_part("objective/bco-pair")


@pytest.mark.parametrize("beta", [0.01, 0.5])
def test_formula_and_gradient(beta):
    def gradients(x):
        return -beta * sig(-beta * x.dw), beta * sig(beta * x.dl)

    check_formula("bco-pair", lambda x: nls(beta * x.dw) + nls(-beta * x.dl), gradients, beta=beta)


def test_it_bounds_dpo_from_above():
    b = random_pairs(64)
    assert (value("bco-pair", b, beta=0.3) > value("dpo", b, beta=0.3)).all()


def test_as_trl():
    check_like_trl("bco-pair", "bco_pair", options={"beta": 0.2}, beta=0.2)


def test_far_rewards_do_not_overflow():
    b = random_pairs(scale=1e4)
    assert np.isfinite(value("bco-pair", b, beta=1.0)).all()
