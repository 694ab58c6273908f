"""Oracle of objective/dr-dpo: the formula in float64 numpy, the authors' code, both limits.

Bugs it is meant to catch: a sum for the mean, β' multiplied, the sign that up-weights implausible pairs, overflow.
"""

import numpy as np
import pytest
import torch
from _pairwise import at_reference, build, letters, of, one_by_one, pairs, picked, sig, slopes, softplus, values

from metier.core import part
from metier.testing import check_part


def test_contract():
    check_part("objective/dr-dpo")


@pytest.mark.parametrize("beta_prime", [1.0, 0.2, 30.0])
def test_formula_and_its_gradient(beta_prime):
    b, x = pairs(), letters(pairs())
    objective = build("dr-dpo", beta=0.3, beta_prime=beta_prime)
    plausible = np.exp(-softplus(-0.3 * x.h) / beta_prime)
    np.testing.assert_allclose(values(objective, b), -beta_prime * np.log(plausible.mean()), rtol=1e-12)
    weight = plausible / plausible.sum()  # of the mean over the step; the losses are summed here
    g_w, g_l = slopes(objective, b)
    np.testing.assert_allclose(g_w, -6 * weight * 0.3 * sig(-0.3 * x.h), rtol=1e-10)
    np.testing.assert_allclose(g_l, -g_w, rtol=1e-12)
    np.testing.assert_allclose(objective(b)[1]["weight"], 6 * weight, rtol=1e-10)


@pytest.mark.parametrize(("beta_prime", "recorded"), [(1.0, 0.6707979856), (0.1, 0.6074961479)])
def test_as_the_authors_code(beta_prime, recorded):
    """Recorded from junkangwu/Dr_DPO 3c0678fe, β 0.1, ``mode_loss: DrDPO``."""
    b = of(
        [-12.0, -30.5, -7.25, -21.0], [-15.0, -22.5, -9.5, -20.0],
        rw=[-13.0, -28.0, -8.0, -24.0], rl=[-14.0, -25.0, -9.0, -19.5],
    )  # fmt: skip
    np.testing.assert_allclose(values(build("dr-dpo", beta_prime=beta_prime), b), recorded, atol=1e-9)


def test_limits():
    dpo = values(build("dpo"), pairs())
    np.testing.assert_allclose(values(build("dr-dpo", beta_prime=1e6), pairs()), dpo.mean(), atol=1e-5)
    np.testing.assert_allclose([values(build("dr-dpo"), p)[0] for p in one_by_one(pairs())], dpo, rtol=1e-12)
    np.testing.assert_allclose(values(build("dr-dpo", beta_prime=1e-3), pairs()), dpo.min(), atol=2e-3)
    np.testing.assert_allclose(values(build("dr-dpo"), at_reference(pairs())), np.log(2), rtol=1e-12)


def test_implausible_pairs_weigh_less():
    b = of([0.0, 0.0], [-50.0, 50.0], rw=[0.0, 0.0], rl=[0.0, 0.0])
    weight = build("dr-dpo")(b)[1]["weight"]
    assert weight[0] > 1.9
    assert weight[1] < 0.1


def test_order_and_needs():
    np.testing.assert_allclose(
        values(build("dr-dpo"), picked(pairs(), torch.tensor([4, 2, 0, 1, 5, 3]))), values(build("dr-dpo"), pairs()), rtol=1e-12
    )
    assert part.load("objective/dr-dpo").__metier__.needs == {"reference", "batch"}
