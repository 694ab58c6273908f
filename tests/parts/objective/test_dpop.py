"""Oracle of objective/dpop: the paper's loss in float64 numpy on both sides of the kink.

Bugs it is meant to catch: the penalty on the rejected answer or with the wrong sign, beta missing on it, a kink at the start.
"""

import numpy as np
import pytest
from _referenced import check_formula, nls, random_pairs, sig, value

from metier.testing import check_part


def test_contract():
    check_part("objective/dpop")


@pytest.mark.parametrize(("beta", "lam"), [(0.3, 50.0), (0.1, 5.0)])
def test_formula_and_gradient(beta, lam):
    def z(x):
        return beta * (x.h - lam * np.maximum(0, -x.dw))

    def gradients(x):
        return -beta * (1 + lam * (x.dw < 0)) * sig(-z(x)), beta * sig(-z(x))

    check_formula("dpop", lambda x: nls(z(x)), gradients, beta=beta, lam=lam)


def test_without_the_penalty_it_is_dpo():
    b = random_pairs()
    np.testing.assert_allclose(value("dpop", b, lam=0.0, beta=0.1), value("dpo", b), rtol=1e-12)
