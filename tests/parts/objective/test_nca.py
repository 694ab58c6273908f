"""Oracle of objective/nca: the two-answer loss in float64 numpy, its optimum, and trl's ``nca_pair``.

Bugs it is meant to catch: a weight of 1 where 1/2 is due, a sign inside a logistic, the margin in place of the rewards.
"""

import numpy as np
import pytest
from _referenced import check_formula, check_like_trl, nls, pairs, sig, slopes

from metier.testing import check_part


def test_contract():
    check_part("objective/nca")


@pytest.mark.parametrize("beta", [0.01, 0.5])
def test_formula_and_gradient(beta):
    def loss(x):
        return nls(beta * x.dw) + 0.5 * nls(-beta * x.dw) + 0.5 * nls(-beta * x.dl)

    def gradients(x):
        return beta * (-sig(-beta * x.dw) + 0.5 * sig(beta * x.dw)), 0.5 * beta * sig(beta * x.dl)

    check_formula("nca", loss, gradients, beta=beta)


def test_the_chosen_reward_has_its_optimum_at_log_2():
    b = pairs([np.log(2) / 0.5], [-3.0], [0.0], [0.0])
    assert slopes("nca", b, beta=0.5)[0].item() == pytest.approx(0, abs=1e-12)


def test_as_trl():
    check_like_trl("nca", "nca_pair", options={"beta": 0.2}, beta=0.2)
