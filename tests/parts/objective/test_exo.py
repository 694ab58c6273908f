"""Oracle of objective/exo: equation 16 in float64 numpy with the closed gradient, and trl's ``exo_pair``.

Bugs it is meant to catch: the forward divergence, ε on the wrong answer, a NaN for margins at which q is 0 or 1.
"""

import numpy as np
import pytest
import torch
from _referenced import build, check_formula, check_like_trl, nls, pairs, sig, slopes, value

from metier.core.errors import UsageError
from metier.testing import check_part


def test_contract():
    check_part("objective/exo")


@pytest.mark.parametrize(("beta", "e"), [(0.1, 1e-3), (0.7, 0.2)])
def test_formula_and_gradient(beta, e):
    def loss(x):
        z = beta * x.h
        return sig(z) * (-nls(z) - np.log(1 - e)) + sig(-z) * (-nls(-z) - np.log(e))

    def gradients(x):
        z = beta * x.h
        slope = beta * sig(z) * sig(-z) * (z - np.log((1 - e) / e))
        return slope, -slope

    check_formula("exo", loss, gradients, beta=beta, label_smoothing=e)


def test_optimum_and_vanishing_gradient():
    z = np.log(999.0)
    b = pairs([z, -60.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0])
    np.testing.assert_allclose(value("exo", b, beta=1.0)[0], 0, atol=1e-12)
    np.testing.assert_allclose(slopes("exo", b, beta=1.0)[0], 0, atol=1e-12)


def test_certain_pairs_in_float32():
    b = pairs([-5e3, 5e3], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0])
    loss = value("exo", type(b)(*(v.float() for v in vars(b).values() if isinstance(v, torch.Tensor))), beta=1.0)
    np.testing.assert_allclose(loss, [-np.log(1e-3), -np.log(0.999)], rtol=1e-5)


def test_as_trl():
    check_like_trl("exo", "exo_pair", label_smoothing=1e-3)


def test_zero_smoothing_is_refused():
    with pytest.raises(UsageError, match="label_smoothing"):
        build("exo", label_smoothing=0.0)
