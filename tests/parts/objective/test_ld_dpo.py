"""Oracle of objective/ld-dpo: token by token in float64 numpy, trl's ``ld_alpha``, DPO.

Bugs it is meant to catch: places counted over the batch, the longer length for the shorter, α on the shared part, the
reference not weighted, answers not in order.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from _pairwise import build, loss_of, one_by_one, pairs, picked, softplus, trl_dpo, values

from metier.testing import check_part


def test_contract():
    check_part("objective/ld-dpo")


def weights(b, alpha):
    n = torch.stack([b.chosen_len, b.rejected_len], 1).numpy()
    found = []
    for i, (w, r) in enumerate(n.astype(int)):
        for length in (w, r):
            found += [1.0 if t < min(n[i]) else alpha for t in range(length)]
    return np.array(found)


@pytest.mark.parametrize("alpha", [0.5, 0.0, 0.9])
def test_formula_and_the_gradient_of_each_token(alpha):
    b = pairs(count=5)
    sequence, w = b.tokens.sequence.numpy(), weights(b, alpha)
    ratio = w * (b.tokens.logps - b.tokens.ref_logps).numpy()
    sums = np.bincount(sequence, ratio, minlength=10)
    margin = 0.2 * (sums[0::2] - sums[1::2])
    assert (b.chosen_len > b.rejected_len).any()
    assert (b.chosen_len < b.rejected_len).any()
    leaf = b.tokens.logps.clone().requires_grad_()
    loss = loss_of(build("ld-dpo", beta=0.2, alpha=alpha), replace(b, tokens=replace(b.tokens, logps=leaf)))
    np.testing.assert_allclose(loss.detach(), softplus(-margin), rtol=1e-12)
    loss.sum().backward()
    slope = 0.2 / (1 + np.exp(margin))
    sign = np.where(sequence % 2 == 0, -1, 1)
    np.testing.assert_allclose(leaf.grad, sign * w * slope[sequence // 2], rtol=1e-12)


@pytest.mark.parametrize("alpha", [0.3, 1.0, 0.0])
def test_as_trl(alpha):
    pytest.importorskip("trl")
    b = pairs(count=8)
    theirs = [trl_dpo(p, beta=0.2, ld_alpha=alpha).item() for p in one_by_one(b)]
    np.testing.assert_allclose(values(build("ld-dpo", beta=0.2, alpha=alpha), b), theirs, rtol=1e-12)


def test_alpha_1_is_dpo():
    np.testing.assert_allclose(values(build("ld-dpo", alpha=1.0), pairs()), values(build("dpo"), pairs()), rtol=1e-12)


def test_answers_in_any_order():
    """Tokens of an answer stay in the order of the text; the answers need not follow each other."""
    b = pairs(count=4)
    shuffle = torch.argsort(torch.tensor([5, 0, 7, 2, 1, 6, 3, 4])[b.tokens.sequence], stable=True)
    moved = {k: v[shuffle] for k, v in vars(b.tokens).items() if v is not None}
    mixed = replace(b, tokens=replace(b.tokens, **moved))
    np.testing.assert_allclose(values(build("ld-dpo"), mixed), values(build("ld-dpo"), b), rtol=1e-12)
    order = torch.tensor([2, 0, 3, 1])
    np.testing.assert_allclose(values(build("ld-dpo"), picked(b, order)), values(build("ld-dpo"), b)[order], rtol=1e-12)


def test_at_the_reference():
    b = pairs()
    same = replace(b, tokens=replace(b.tokens, logps=b.tokens.ref_logps))
    np.testing.assert_allclose(values(build("ld-dpo"), same), np.log(2), rtol=1e-12)
