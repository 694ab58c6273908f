"""Oracle of objective/refdpo: its three rewards in float64 numpy, the authors' code, and what they are equal to.

Bugs it is meant to catch: a reference in the posterior, needs that do not follow, β in the metrics.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from _pairwise import at_reference, build, letters, of, pairs, ref_randomised, sig, slopes, softplus, values

from metier.testing import check_part


def test_contract():
    check_part("objective/refdpo")


@pytest.mark.parametrize("reward", ["ratio", "posterior", "likelihood"])
def test_formulas_and_gradients(reward):
    b, x = pairs(), letters(pairs())
    z = 0.3 * (x.m if reward == "posterior" else x.h)
    objective = build("refdpo", reward=reward, beta=0.3)
    np.testing.assert_allclose(values(objective, b), softplus(-z), rtol=1e-12)
    g_w, g_l = slopes(objective, b)
    np.testing.assert_allclose(g_w, -0.3 * sig(-z), rtol=1e-12)
    np.testing.assert_allclose(g_l, -g_w, rtol=1e-12)
    np.testing.assert_allclose(objective(b)[1]["margin"], z, rtol=1e-12)


def test_as_the_authors_code():
    """Recorded from ``dpo_loss`` of yale-nlp/refdpo c1dc5e12, β 0.05."""
    b = of(
        [-12.0, -30.5, -7.25, -21.0], [-15.0, -22.5, -9.5, -20.0],
        rw=[-13.0, -28.0, -8.0, -24.0], rl=[-14.0, -25.0, -9.0, -19.5],
    )  # fmt: skip
    with_reference, without = [0.64439666, 0.82593942, 0.66238538, 0.60947043], [0.62095705, 0.91301525, 0.63847838, 0.71845965]
    np.testing.assert_allclose(values(build("refdpo", beta=0.05), b), with_reference, atol=1e-8)
    np.testing.assert_allclose(values(build("refdpo", beta=0.05, reward="posterior"), b), without, atol=1e-8)


def test_what_they_are_equal_to():
    b = pairs()
    posterior = values(build("refdpo", reward="posterior"), b)
    np.testing.assert_allclose(values(build("refdpo", beta=0.1), b), values(build("dpo"), b), rtol=1e-14)
    nothing = torch.zeros(6, dtype=torch.float64)
    zeros = replace(b, ref_chosen_logps=nothing, ref_rejected_logps=nothing)
    np.testing.assert_allclose(values(build("refdpo"), zeros), posterior, rtol=1e-14)
    prior = -torch.arange(6.0, dtype=torch.float64)  # of the prompt, not of the answer
    alike = replace(b, ref_chosen_logps=prior, ref_rejected_logps=prior)
    np.testing.assert_allclose(values(build("refdpo", reward="likelihood"), alike), posterior, rtol=1e-12)
    np.testing.assert_allclose(values(build("refdpo"), at_reference(b)), np.log(2), rtol=1e-12)


def test_needs_follow_the_reward():
    assert build("refdpo").needs == build("refdpo", reward="likelihood").needs == {"reference"}
    posterior = build("refdpo", reward="posterior")
    assert posterior.needs == frozenset()
    np.testing.assert_array_equal(values(posterior, pairs()), values(posterior, ref_randomised(pairs())))
