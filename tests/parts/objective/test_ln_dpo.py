"""Oracle of objective/ln-dpo: the loss in float64 numpy, its reduction to dpo, and trl's ``sigmoid_norm``.

Bugs it is meant to catch: one length for both answers, reference scores left as sums, dpo's beta as default.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from _referenced import check_formula, check_like_trl, nls, random_pairs, sig, slopes, value

from metier.testing import check_part


def test_contract():
    check_part("objective/ln-dpo")


@pytest.mark.parametrize("beta", [5.0, 1.0])
def test_formula_and_gradient(beta):
    def z(x):
        return beta * (x.dw / x.nw - x.dl / x.nl)

    def gradients(x):
        return -beta / x.nw * sig(-z(x)), beta / x.nl * sig(-z(x))

    check_formula("ln-dpo", lambda x: nls(z(x)), gradients, beta=beta)


def test_the_default_is_five():
    b = random_pairs()
    assert torch.equal(value("ln-dpo", b), value("ln-dpo", b, beta=5.0))


def test_equal_lengths_are_dpo_with_beta_over_n():
    n = torch.full((16,), 6.0, dtype=torch.float64)
    b = replace(random_pairs(), chosen_len=n, rejected_len=n)
    np.testing.assert_allclose(value("ln-dpo", b, beta=3.0), value("dpo", b, beta=0.5), rtol=1e-12)
    for a, c in zip(slopes("ln-dpo", b, beta=3.0), slopes("dpo", b, beta=0.5), strict=True):
        np.testing.assert_allclose(a, c, rtol=1e-12)


def test_as_trl():
    check_like_trl("ln-dpo", "sigmoid_norm", beta=5.0)


def test_an_empty_answer_counts_as_one_token():
    empty = torch.zeros(16, dtype=torch.float64)
    b = replace(random_pairs(), chosen_len=empty, rejected_len=empty)
    np.testing.assert_allclose(value("ln-dpo", b, beta=0.5), value("dpo", b, beta=0.5), rtol=1e-12)
