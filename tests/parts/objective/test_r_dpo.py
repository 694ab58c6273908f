"""Oracle of objective/r-dpo: the length-regularized optimum in float64 numpy, and which way length goes.

Bugs it is meant to catch: the minus sign of published tables, beta on the length term, characters or prompts counted.
"""

import numpy as np
import pytest
import torch
from _referenced import check_formula, nls, pairs, random_pairs, sig, value

from metier.testing import check_part


def test_contract():
    check_part("objective/r-dpo")


@pytest.mark.parametrize(("beta", "alpha"), [(0.1, 0.01), (0.5, 0.3)])
def test_formula_and_gradient(beta, alpha):
    def z(x):
        return beta * x.h + alpha * (x.nw - x.nl)

    def gradients(x):
        return -beta * sig(-z(x)), beta * sig(-z(x))

    check_formula("r-dpo", lambda x: nls(z(x)), gradients, beta=beta, alpha=alpha)


def test_without_alpha_it_is_dpo():
    b = random_pairs()
    np.testing.assert_allclose(value("r-dpo", b, alpha=0.0), value("dpo", b), rtol=1e-12)


def mean_length(alpha):
    """Of the policy that minimizes the population loss on answers of 1 to 8 tokens, with rewards that grow with length."""
    length, beta = torch.arange(1.0, 9.0, dtype=torch.float64), 0.5
    reward, ref = 0.2 * length, torch.full((8,), -np.log(8), dtype=torch.float64)
    i, j = (k.flatten() for k in torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij"))
    weight = torch.sigmoid(reward[i] - reward[j])
    table = torch.zeros(8, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([table], lr=1, max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        logp = table.log_softmax(0)
        b = pairs(logp[i].detach(), logp[j].detach(), ref[i], ref[j], (length[i], length[j]))
        b = type(b)(logp[i], logp[j], b.chosen_len, b.rejected_len, b.ref_chosen_logps, b.ref_rejected_logps)
        loss = (weight * value("r-dpo", b, beta=beta, alpha=alpha)).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    found = table.detach().softmax(0)
    torch.testing.assert_close(found, torch.softmax((reward - alpha * length) / beta, 0), atol=1e-5, rtol=1e-4)
    return (found * length).sum().item()


def test_answers_get_shorter_as_alpha_grows():
    """The sign: the minimizer is the optimum of ``r - α|y|``."""
    lengths = [mean_length(a) for a in (0.0, 0.1, 0.3)]
    assert lengths[0] > lengths[1] > lengths[2]
