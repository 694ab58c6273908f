"""Oracle of objective/xpo: the formula in float64 numpy, and recorded numbers of trl's ``XPOTrainer``.

Bugs it is meant to catch: the sign of the bonus, a sum over samples, the reference's scores of the samples.
"""

from dataclasses import replace

import numpy as np
import pytest
from _pairwise import at_reference, build, letters, loss_of, of, pairs, sig, slopes, softplus, values

from metier.testing import check_part


def test_contract():
    check_part("objective/xpo")


@pytest.mark.parametrize("alpha", [5e-6, 0.3])
def test_formula_and_its_gradient(alpha):
    b, x = pairs(samples=3), letters(pairs(samples=3))
    np.testing.assert_allclose(
        values(build("xpo", beta=0.2, alpha=alpha), b), softplus(-0.2 * x.h) + alpha * b.sampled_logps.numpy().mean(1), rtol=1e-12
    )
    g_w, g_l = slopes(build("xpo", beta=0.2, alpha=alpha), b)
    np.testing.assert_allclose(g_w, -0.2 * sig(-0.2 * x.h), rtol=1e-12)
    np.testing.assert_allclose(g_l, -g_w, rtol=1e-12)


def test_the_likelihood_of_the_references_answers_falls():
    b = pairs(samples=4)
    b.sampled_logps.requires_grad_()
    loss_of(build("xpo", alpha=0.2), b).sum().backward()
    np.testing.assert_allclose(b.sampled_logps.grad.numpy(), 0.2 / 4)


def test_as_trl_computes_it():
    """Recorded from ``XPOTrainer._compute_losses`` of trl 0.19.1 (the installed version has none): the pair is one answer of the
    policy and one of the reference, which is also the sample; here the reference's lost, then won.
    """
    b = of([-10.0, -9.0], [-12.0, -11.0], rw=[-11.0, -10.0], rl=[-11.5, -10.0])
    sampled = of([-12.0, -9.0], [0.0, 0.0]).chosen_logps[:, None]
    found = values(build("xpo", beta=0.5, alpha=0.01), replace(b, sampled_logps=sampled))
    np.testing.assert_allclose(found, [0.26687100611489994, 0.22326168751822287], rtol=1e-12)


def test_without_bonus_it_is_dpo():
    b = pairs(samples=1)
    np.testing.assert_allclose(values(build("xpo", alpha=0.0), b), values(build("dpo"), b), rtol=1e-12)
    np.testing.assert_allclose(values(build("xpo", alpha=0.0), at_reference(b)), np.log(2), rtol=1e-12)


def test_samples_that_do_not_exist_are_left_out():
    b = pairs(samples=3)
    length = b.sampled_len.clone()
    length[1, 2] = 0
    bonus = build("xpo", alpha=0.3)(replace(b, sampled_len=length))[1]["bonus"][1].item()
    assert bonus == pytest.approx(0.3 * b.sampled_logps[1, :2].mean().item())
