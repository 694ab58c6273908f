"""Oracle of objective/rpo: dpo plus the chosen answer's mean negative log-likelihood, in float64 numpy.

Bugs it is meant to catch: a sum in place of the mean, the rejected answer's likelihood, the reference inside the second term.
"""

import numpy as np
import pytest
from _referenced import build, check_formula, nls, random_pairs, sig, value

from metier.testing import check_part


def test_contract():
    check_part("objective/rpo")


@pytest.mark.parametrize(("beta", "alpha"), [(0.1, 1.0), (0.5, 0.005)])
def test_formula_and_gradient(beta, alpha):
    def gradients(x):
        return -beta * sig(-beta * x.h) - alpha / x.nw, beta * sig(-beta * x.h)

    check_formula("rpo", lambda x: nls(beta * x.h) - alpha * x.lw / x.nw, gradients, beta=beta, alpha=alpha)


def test_reductions():
    b = random_pairs()
    np.testing.assert_allclose(value("rpo", b, alpha=0.0), value("dpo", b), rtol=1e-12)
    both = build("combined", losses=["dpo", "nll"], weights=[1.0, 0.3])(b)[0]
    np.testing.assert_allclose(value("rpo", b, alpha=0.3), both, rtol=1e-12)
