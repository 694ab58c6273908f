"""Oracle of objective/ipo: equation 17 in float64 numpy, the optimum on a table, and trl's ``ipo``.

Bugs it is meant to catch: tau for 1/tau, the 1/2 of the target forgotten, one length for both answers, sums where averages are
due.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from _referenced import build, check_formula, check_like_trl, random_pairs, value

from metier.testing import check_part


def test_contract():
    check_part("objective/ipo")


@pytest.mark.parametrize("tau", [0.1, 1.0])
def test_averaged(tau):
    def loss(x):
        return (x.dw / x.nw - x.dl / x.nl - 0.5 / tau) ** 2

    def gradients(x):
        slope = 2 * (x.dw / x.nw - x.dl / x.nl - 0.5 / tau)
        return slope / x.nw, -slope / x.nl

    check_formula("ipo", loss, gradients, tau=tau)


def test_whole_answers():
    def gradients(x):
        return 2 * (x.h - 2.5), -2 * (x.h - 2.5)

    check_formula("ipo", lambda x: (x.h - 2.5) ** 2, gradients, tau=0.2, average=False)


def test_the_margin_in_the_metrics_is_a_half_at_the_optimum():
    b = random_pairs()
    best = b.ref_chosen_logps + b.chosen_len * ((b.rejected_logps - b.ref_rejected_logps) / b.rejected_len + 1 / 0.6)
    loss, metrics = build("ipo", tau=0.3)(replace(b, chosen_logps=best))
    np.testing.assert_allclose(loss, 0, atol=1e-18)
    np.testing.assert_allclose(metrics["margin"], 0.5, rtol=1e-9)


def test_an_empty_answer_is_not_divided_by_zero():
    b = replace(random_pairs(), rejected_len=torch.zeros(16, dtype=torch.float64))
    assert torch.isfinite(value("ipo", b)).all()


def test_population_labels_of_two_answers_give_their_preference():
    """``h = (P - 1/2)/τ`` for two answers with known preference probability P."""
    p, tau = torch.tensor([0.9, 0.35, 0.5], dtype=torch.float64), 0.4
    ref = torch.log_softmax(torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), 1)
    table = ref.clone().requires_grad_()
    b = random_pairs(3)
    for _ in range(300):
        logp = table.log_softmax(1)
        either = [
            value("ipo", replace(b, chosen_logps=logp[:, i], rejected_logps=logp[:, 1 - i], ref_chosen_logps=ref[:, i],
                                 ref_rejected_logps=ref[:, 1 - i]), tau=tau, average=False)
            for i in (0, 1)
        ]  # fmt: skip
        (grad,) = torch.autograd.grad((p * either[0] + (1 - p) * either[1]).sum(), table)
        table.data -= 0.2 * grad
    h = ((table - ref)[:, 0] - (table - ref)[:, 1]).detach()
    np.testing.assert_allclose(h, (p - 0.5) / tau, atol=1e-6)


@pytest.mark.parametrize("divergence", ["reverse_kl"])
def test_as_trl(divergence):
    check_like_trl("ipo", "ipo", options={"tau": 0.25}, beta=0.25, divergence=divergence)
