"""Oracle of objective/unlikelihood: token by token in float64 numpy.

Bugs it is meant to catch: the chosen answer's tokens penalized, one probability for the whole answer, a sum for the mean.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from _pairwise import build, letters, loss_of, pairs, picked, ref_randomised, values

from metier.testing import check_part


def test_contract():
    check_part("objective/unlikelihood")


def per_pair(b, side):
    return [b.tokens.logps[b.tokens.sequence == 2 * i + side].numpy() for i in range(len(b.chosen_logps))]


@pytest.mark.parametrize("alpha", [1.0, 0.0, 0.3])
def test_formula(alpha):
    b = pairs()
    penalty = np.array([np.mean(-np.log(1 - np.exp(t))) for t in per_pair(b, 1)])
    expected = np.array([-np.mean(t) for t in per_pair(b, 0)]) + alpha * penalty
    np.testing.assert_allclose(values(build("unlikelihood", alpha=alpha), b), expected, rtol=1e-10)
    np.testing.assert_allclose(build("unlikelihood", alpha=alpha)(b)[1]["penalty"], penalty, rtol=1e-10)


def test_gradient_of_each_token():
    """``α p/(1-p)/n`` on rejected tokens, none on chosen ones; these are raised through their sum."""
    b, x = pairs(), letters(pairs())
    leaves = [v.clone().requires_grad_() for v in (b.tokens.logps, b.chosen_logps)]
    loss_of(
        build("unlikelihood", alpha=0.7), replace(b, tokens=replace(b.tokens, logps=leaves[0]), chosen_logps=leaves[1])
    ).sum().backward()
    p = np.exp(b.tokens.logps.numpy())
    rejected = b.tokens.sequence.numpy() % 2 == 1
    n = x.nl[b.tokens.sequence.numpy() // 2]
    np.testing.assert_allclose(leaves[0].grad.numpy(), np.where(rejected, 0.7 * p / (1 - p) / n, 0.0), rtol=1e-9)
    np.testing.assert_allclose(leaves[1].grad.numpy(), -1 / x.nw, rtol=1e-12)


def test_a_certain_token_is_held():
    b = pairs()
    leaf = torch.where(b.tokens.sequence == 1, 0.0, b.tokens.logps).requires_grad_()
    loss = loss_of(build("unlikelihood"), replace(b, tokens=replace(b.tokens, logps=leaf)))
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert torch.isfinite(leaf.grad).all()
    assert loss[0] > 13


def test_order_of_pairs():
    b, order = pairs(), torch.tensor([3, 0, 5, 1])
    np.testing.assert_allclose(
        values(build("unlikelihood"), picked(b, order)), values(build("unlikelihood"), b)[order], rtol=1e-12
    )


def test_the_reference_is_ignored():
    np.testing.assert_array_equal(values(build("unlikelihood"), pairs()), values(build("unlikelihood"), ref_randomised(pairs())))
