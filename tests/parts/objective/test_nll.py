"""Oracle of objective/nll: the chosen answer's negative log-likelihood, per token and whole, and trl's ``sft``.

Bugs it is meant to catch: the rejected answer trained, its length used, the reference subtracted.
"""

from dataclasses import replace

import numpy as np
import torch
from _referenced import by_trl, check_formula, random_pairs, slopes, value

from metier.testing import check_part


def test_contract():
    check_part("objective/nll")


def test_formula_and_gradient():
    check_formula("nll", lambda x: -x.lw / x.nw, lambda x: (-1 / x.nw, 0.0))
    check_formula("nll", lambda x: -x.lw, lambda x: (-1.0, 0.0), reduction="sum")


def test_the_reference_is_not_read():
    b = random_pairs()
    assert torch.equal(value("nll", b), value("nll", replace(b, ref_chosen_logps=None, ref_rejected_logps=None)))


def test_as_trl_when_lengths_are_equal():
    n = torch.full((16,), 5.0, dtype=torch.float64)
    b = replace(random_pairs(), chosen_len=n)
    loss, g_w, _ = by_trl("sft", b)
    np.testing.assert_allclose(value("nll", b).mean().item(), loss, rtol=1e-5)
    np.testing.assert_allclose(slopes("nll", b)[0] / 16, g_w, rtol=1e-5)
