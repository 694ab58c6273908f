"""Oracle of objective/cal-dpo: the two calibrated targets in float64 numpy, with the constants of the authors' release.

Bugs it is meant to catch: beta inside the logistic term, both answers calibrated to the same target, 1/beta for 1/(2 beta).
"""

import numpy as np
import pytest
from _referenced import check_formula, nls, pairs, sig, slopes, value

from metier.testing import check_part


def test_contract():
    check_part("objective/cal-dpo")


@pytest.mark.parametrize(("beta", "c"), [(0.1, 0.5), (0.4, 1.0)])
def test_formula_and_gradient(beta, c):
    t = 1 / (2 * beta)

    def loss(x):
        return nls(x.h) + c * ((x.dw - t) ** 2 + (x.dl + t) ** 2)

    def gradients(x):
        return -sig(-x.h) + 2 * c * (x.dw - t), sig(-x.h) + 2 * c * (x.dl + t)

    check_formula("cal-dpo", loss, gradients, beta=beta, weight=c)


def test_by_hand():
    """``Δ_w = 4, Δ_l = -1``: ``log(1+e^-5) + ((4-5)² + (-1+5)²)/2``, the targets being ±5."""
    b = pairs([4.0], [-1.0], [0.0], [0.0])
    assert value("cal-dpo", b).item() == pytest.approx(0.006715348489118 + 8.5, rel=1e-12)


def test_the_optimum_is_at_the_targets():
    """Up to the pull of the logistic term, ``σ(-10)`` at β = 0.1."""
    b = pairs([5.0 + sig(-10.0)], [-5.0 - sig(-10.0)], [0.0], [0.0])
    np.testing.assert_allclose(slopes("cal-dpo", b), 0, atol=1e-8)
