"""Oracle of objective/alpha-dpo: moments and z-scores by hand in float64 numpy, the authors' code, SimPO.

Bugs it is meant to catch: sums for means, a biased standard deviation, gradient through the margin, γ in the other unit, a state
that moves in evaluation, moments used before the step is in them.
"""

import numpy as np
import pytest
from _pairwise import at_reference, build, check_moments, letters, of, pairs, sig, slopes, softplus, values

from metier.testing import check_part


def test_contract():
    check_part("objective/alpha-dpo")


AUTHORS = of(
    [-12.0, -30.5, -7.25, -21.0], [-15.0, -22.5, -9.5, -20.0], [5.0, 12.0, 4.0, 9.0], [6.0, 8.0, 5.0, 10.0],
    [-13.0, -28.0, -8.0, -24.0], [-14.0, -25.0, -9.0, -19.5],
)  # fmt: skip
RECORDED = [
    [5.31778327, 0.00494317, 4.44666428, 6.58899627],
    [3.35366215, 0.08090369, 2.92589087, 4.51318465],
    [2.72350319, 0.19551737, 2.44231674, 3.83148839],
    [2.41938385, 0.29623102, 2.20933589, 3.49598006],
]


def test_as_the_authors_code():
    """Recorded from junkangwu/alpha-DPO fab32091: the same pairs four times, β 2.5, ratio 0.6, α 0.2."""
    objective = build("alpha-dpo", bias_correction=False, clip=1e9)
    for expected in RECORDED:
        objective.observe(AUTHORS)
        np.testing.assert_allclose(values(objective, AUTHORS), expected, atol=1e-8)


def test_moments_margin_and_gradient():
    steps = [pairs(s) for s in (1, 2, 3)]
    objective = build("alpha-dpo", alpha=0.3, momentum=0.7, clip=0.7)
    mean = std = 0.0
    for b in steps:
        x = letters(b)
        gap = x.Rw - x.Rl
        mean, std = 0.7 * mean + 0.3 * gap.mean(), 0.7 * std + 0.3 * gap.std(ddof=1)
        objective.observe(b)
    weight = 1 - 0.7**3
    z = np.clip((gap - mean / weight) / (std / weight), -0.7, 0.7)
    assert (np.abs(z) == 0.7).any()
    assert (np.abs(z) < 0.7).any()
    u = 2.5 * (x.aw - x.al - 0.6 - 0.3 * z)
    np.testing.assert_allclose(values(objective, b), softplus(-u), rtol=1e-10)
    np.testing.assert_allclose(objective(b)[1]["z"], z, rtol=1e-10)
    g_w, g_l = slopes(objective, b)
    np.testing.assert_allclose(g_w, -2.5 * sig(-u) / x.nw, rtol=1e-10)
    np.testing.assert_allclose(g_l, 2.5 * sig(-u) / x.nl, rtol=1e-10)


def test_simpo_without_alpha_before_any_step_and_at_the_reference():
    simpo = build("simpo", beta=2.5, gamma=1.5)
    seen, fresh, start = build("alpha-dpo", alpha=0.0), build("alpha-dpo"), build("alpha-dpo")
    seen.observe(pairs(1))
    start.observe(at_reference(pairs()))
    np.testing.assert_allclose(values(seen, pairs()), values(simpo, pairs()), rtol=1e-12)
    np.testing.assert_allclose(values(fresh, pairs()), values(simpo, pairs()), rtol=1e-12)
    np.testing.assert_allclose(values(start, at_reference(pairs())), values(simpo, at_reference(pairs())), rtol=1e-12)


def test_state():
    check_moments("alpha-dpo")


@pytest.mark.parametrize("count", [1, 4])
def test_identical_gaps_do_not_divide_by_zero(count):
    b = of([-1.0] * count, [-2.0] * count, rw=[-1.5] * count, rl=[-3.0] * count)
    objective = build("alpha-dpo")
    objective.observe(b)
    assert np.isfinite(values(objective, b)).all()
