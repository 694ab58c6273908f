"""Oracle of objective/discopop: equation 5 in float64 numpy, its shape, and trl's ``discopop``.

Bugs it is meant to catch: the two components exchanged, the modulation without its temperature, 0 · inf for wrong pairs.
"""

import numpy as np
import pytest
import torch
from _referenced import check_formula, check_like_trl, nls, pairs, sig, slopes, value

from metier.testing import check_part


def test_contract():
    check_part("objective/discopop")


def test_formula_and_gradient():
    beta, tau = 0.1, 0.05

    def loss(x):
        z = beta * x.h
        return sig(-z / tau) * nls(z) + sig(z / tau) * np.exp(-z)

    def gradients(x):
        z = beta * x.h
        w = sig(z / tau)
        slope = beta * (w * (1 - w) / tau * (np.exp(-z) - nls(z)) - (1 - w) * sig(-z) - w * np.exp(-z))
        return slope, -slope

    check_formula("discopop", loss, gradients, beta=beta, tau=tau)


def at(z):
    zero = np.zeros_like(z)
    return pairs(z, zero, zero, zero)


def test_it_is_not_monotone():
    z = np.linspace(-0.3, 0.3, 6001)
    loss = value("discopop", at(z), beta=1.0).numpy()
    rising = z[np.diff(loss, append=loss[-1] - 1) > 0]
    assert rising[0] == pytest.approx(-0.119, abs=2e-3)
    assert rising[-1] == pytest.approx(0.071, abs=2e-3)
    assert loss[np.abs(z + 0.119).argmin()] == pytest.approx(0.7859, abs=1e-4)


def test_the_start():
    assert value("discopop", at(np.zeros(1))).item() == pytest.approx(0.8466, abs=1e-4)
    assert slopes("discopop", at(np.zeros(1)), beta=1.0)[0].item() == pytest.approx(0.784, abs=1e-3)


@pytest.mark.parametrize("z", [-70.0, -90.0, -1e4, 1e4])
def test_very_wrong_and_very_right_pairs_in_float32(z):
    """The weight is 0 where the exponential is not a number any more."""
    w = torch.tensor([z]).requires_grad_()
    zero = torch.zeros(1)
    b = at(np.array([z]))
    b = type(b)(w, zero, zero + 1, zero + 1, zero, zero)
    loss = value("discopop", b, beta=1.0)
    loss.sum().backward()
    assert loss.item() == pytest.approx(max(-z, 0.0), rel=1e-5)
    assert w.grad.item() == pytest.approx(-1.0 if z < 0 else 0.0, abs=1e-5)


def test_as_trl():
    check_like_trl("discopop", "discopop", options={"tau": 0.2}, tau=0.2)
