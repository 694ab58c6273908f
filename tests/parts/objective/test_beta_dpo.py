"""Oracle of objective/beta-dpo: β by hand in float64 numpy, the authors' code, the filter, the state.

Bugs it is meant to catch: β in its own margin, gradient through β, M₀ used before the step is in it, a state that moves in
evaluation, an average over all pairs when some are left out.
"""

import numpy as np
import pytest
import torch
from _pairwise import build, check_moments, letters, of, pairs, picked, sig, slopes, softplus, values

from metier.testing import check_part


def test_contract():
    check_part("objective/beta-dpo")


AUTHORS = of(
    [-12.0, -30.5, -7.25, -21.0], [-15.0, -22.5, -9.5, -20.0],
    rw=[-13.0, -28.0, -8.0, -24.0], rl=[-14.0, -25.0, -9.0, -19.5],
)  # fmt: skip
RECORDED = [
    [0.57714437, 1.04922798, 0.61886358, 0.50002543],
    [0.57921903, 1.04156821, 0.62022736, 0.50328722],
    [0.58109093, 1.03470166, 0.62145662, 0.50623681],
]


def test_as_the_authors_code():
    """Recorded from junkangwu/beta-DPO 16290473: the same pairs three times, β 0.1, a 0.6, no pair left out."""
    objective = build("beta-dpo", bias_correction=False)
    for expected in RECORDED:
        objective.observe(AUTHORS)
        np.testing.assert_allclose(values(objective, AUTHORS), expected, atol=1e-8)


@pytest.mark.parametrize("corrected", [True, False])
def test_beta_and_the_gradient(corrected):
    first, second = pairs(1), pairs(2)
    objective = build("beta-dpo", beta=0.2, a=0.5, momentum=0.8, bias_correction=corrected)
    objective.observe(first)
    objective.observe(second)
    m1, m2 = letters(first).h.mean(), letters(second).h.mean()
    start = 0.8 * 0.2 * m1 + 0.2 * m2
    start = start / (1 - 0.8**2) if corrected else start
    x = letters(second)
    beta = max(1e-3, 0.2 * (1 + 0.5 * (m2 - start)))
    np.testing.assert_allclose(values(objective, second), softplus(-beta * x.h), rtol=1e-10)
    g_w, g_l = slopes(objective, second)
    np.testing.assert_allclose(g_w, -beta * sig(-beta * x.h), rtol=1e-10)
    np.testing.assert_allclose(g_l, -g_w, rtol=1e-12)
    np.testing.assert_allclose(objective(second)[1]["beta"], beta, rtol=1e-10)


def test_dpo_without_a_and_on_the_first_step():
    for objective in (build("beta-dpo", a=0.0), build("beta-dpo")):
        np.testing.assert_allclose(values(objective, pairs()), values(build("dpo"), pairs()), rtol=1e-12)
        objective.observe(pairs())
        np.testing.assert_allclose(values(objective, pairs()), values(build("dpo"), pairs()), rtol=1e-10)


def test_beta_has_a_floor():
    objective = build("beta-dpo", a=50.0)
    objective.observe(of([0.0, 10.0], [0.0, 0.0], rw=[0.0, 0.0], rl=[0.0, 0.0]))
    low = of([-10.0, -20.0], [0.0, 0.0], rw=[0.0, 0.0], rl=[0.0, 0.0])
    np.testing.assert_allclose(objective(low)[1]["beta"], 1e-3)


def test_filter():
    """h = 10, 0, 1.5, -8 around M₀ = 6, the first not far from M₀: half of them stay and set loss and β."""
    objective = build("beta-dpo", keep=0.5, a=1.0)
    objective.observe(of([5.0, 7.0], [0.0, 0.0], rw=[0.0, 0.0], rl=[0.0, 0.0]))
    b = of([10.0, 0.0, 1.5, -8.0], [0.0] * 4, rw=[0.0] * 4, rl=[0.0] * 4)
    loss, metrics = objective(b)
    beta = 0.1 * (1 + (5.75 - 6.0))
    np.testing.assert_allclose(metrics["beta"], beta, rtol=1e-9)
    np.testing.assert_allclose(loss, [2 * softplus(-beta * 10.0), 0, 2 * softplus(-beta * 1.5), 0], rtol=1e-9)
    order = torch.tensor([2, 3, 0, 1])
    np.testing.assert_allclose(values(objective, picked(b, order)), loss[order], rtol=1e-12)
    assert np.count_nonzero(values(build("beta-dpo", keep=0.0), b)) == 1
    assert np.count_nonzero(values(build("beta-dpo", keep=0.8), pairs(count=5))) == 4


def test_state():
    check_moments("beta-dpo")
