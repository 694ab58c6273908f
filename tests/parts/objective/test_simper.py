"""Oracle of objective/simper: inverse perplexities in float64 numpy, the authors' code, the optimum of a table policy.

Bugs it is meant to catch: exponentials of sums, a sign, perplexities for their inverses.
"""

import numpy as np
import pytest
import torch
from _pairwise import all_pairs, build, letters, loss_of, minimised, of, pairs, ref_randomised, slopes, values

from metier.testing import check_part


def test_contract():
    check_part("objective/simper")


def test_formula_and_its_gradient():
    b, x = pairs(), letters(pairs())
    loss = values(build("simper"), b)
    np.testing.assert_allclose(loss, np.exp(x.al) - np.exp(x.aw), rtol=1e-12)
    assert (np.abs(loss) < 1).all()
    g_w, g_l = slopes(build("simper"), b)
    np.testing.assert_allclose(g_w, -np.exp(x.aw) / x.nw, rtol=1e-12)
    np.testing.assert_allclose(g_l, np.exp(x.al) / x.nl, rtol=1e-12)


def test_as_the_authors_code():
    """Recorded from ``simpo_loss``, branch SimPER, of tengxiao1/SimPER db08c97f."""
    b = of([-12.0, -30.5, -7.25, -21.0], [-15.0, -22.5, -9.5, -20.0], [5.0, 12.0, 4.0, 9.0], [6.0, 8.0, 5.0, 10.0])
    np.testing.assert_allclose(values(build("simper"), b), [-0.00863295, -0.0186804, -0.01367689, 0.03836332], atol=1e-8)


def test_equal_answers_and_their_length():
    """Equal mean log-probabilities give 0, whatever the lengths; equal answers have opposite gradients."""
    assert values(build("simper"), of([-6.0], [-3.0], [4.0], [2.0]))[0] == 0
    g_w, g_l = slopes(build("simper"), of([-6.0], [-6.0], [4.0], [4.0]))
    assert g_w + g_l == 0


def test_the_penalty_is_that_of_exmate():
    b = pairs()
    np.testing.assert_allclose(slopes(build("simper"), b)[1], slopes(build("exmate", lam=1.0), b)[1], rtol=1e-14)


def test_the_optimum_of_a_table_is_one_answer():
    """All mass on ``argmax p_chosen - p_rejected``: mode seeking."""
    torch.manual_seed(3)
    chosen, rejected = (torch.randn(3, 5, dtype=torch.float64).softmax(-1) for _ in range(2))

    def loss(logp):
        b, x, w, r = all_pairs(logp)
        return (loss_of(build("simper"), b) * chosen[x, w] * rejected[x, r]).sum()

    found = minimised(loss, torch.zeros(3, 5)).exp()
    best = (chosen - rejected).argmax(-1)
    assert torch.equal(found.argmax(-1), best)
    assert found.max(-1).values.min() > 0.99


def test_the_reference_is_ignored():
    np.testing.assert_array_equal(values(build("simper"), pairs()), values(build("simper"), ref_randomised(pairs())))


@pytest.mark.parametrize("option", ["beta", "gamma"])
def test_it_has_no_options(option):
    from metier.core.errors import UsageError

    with pytest.raises(UsageError, match=option):
        build("simper", **{option: 1.0})
