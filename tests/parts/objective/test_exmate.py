"""Oracle of objective/exmate: the formula in float64 numpy, its limits, and its gradient on shared prefixes.

Bugs it is meant to catch: the exponential of a sum, λ on the likelihood, a penalty that grows.
"""

import numpy as np
import pytest
import torch
from _pairwise import build, letters, of, pairs, ref_randomised, slopes, values

from metier.testing import check_part


def test_contract():
    check_part("objective/exmate")


@pytest.mark.parametrize("lam", [0.05, 0.0, 3.0])
def test_formula_and_its_gradient(lam):
    b, x = pairs(), letters(pairs())
    loss = values(build("exmate", lam=lam), b)
    np.testing.assert_allclose(loss, -x.aw + lam * np.exp(x.al), rtol=1e-12)
    assert ((loss + x.aw >= -1e-15) & (loss + x.aw <= lam)).all()
    g_w, g_l = slopes(build("exmate", lam=lam), b)
    np.testing.assert_allclose(g_w, -1 / x.nw, rtol=1e-12)
    np.testing.assert_allclose(g_l, lam * np.exp(x.al) / x.nl, rtol=1e-12)


def test_equal_answers_are_still_learnt():
    """One answer on both sides: its coefficient is ``-(1 - λ p)`` of the token mean."""
    b = of([-6.0], [-6.0], [4.0], [4.0])
    g_w, g_l = slopes(build("exmate", lam=0.5), b)
    assert 4 * (g_w + g_l)[0] == pytest.approx(-(1 - 0.5 * np.exp(-1.5)))


def logits_of_a_shared_prefix(objective, z, prefix, chosen, rejected, ref):
    """Loss of two answers that share ``prefix``; logits ``[T, V]`` for each place and side, the same where shared."""
    logp = {side: torch.cat([z["shared"], z[side]]).log_softmax(-1) for side in ("w", "l")}
    sums = [logp[s][torch.arange(len(prefix + own)), prefix + own].sum() for s, own in (("w", chosen), ("l", rejected))]
    n = [float(len(prefix + own)) for own in (chosen, rejected)]
    from metier.core.batch import Pairs

    b = Pairs(sums[0][None], sums[1][None], *(torch.tensor([v]).double() for v in n), *(torch.tensor([v]).double() for v in ref))
    result = objective(b)
    return result[0].sum()


@pytest.mark.parametrize("name", ["dpo", "exmate"])
def test_shared_prefix(name):
    """On shared tokens DPO gives no gradient, ExMATE ``(1 - λ p)`` times that of maximum likelihood."""
    torch.manual_seed(0)
    z = {k: torch.randn(n, 7, dtype=torch.float64, requires_grad=True) for k, n in (("shared", 4), ("w", 2), ("l", 2))}
    options = {"lam": 0.4} if name == "exmate" else {}
    args = (z, [1, 2, 3, 4], [5, 6], [0, 3], [-9.0, -8.0])
    (g,) = torch.autograd.grad(logits_of_a_shared_prefix(build(name, **options), *args), z["shared"])
    if name == "dpo":
        assert g.abs().max() < 1e-15
        return
    (mle,) = torch.autograd.grad(logits_of_a_shared_prefix(build("exmate", lam=0.0), *args), z["shared"])
    with torch.no_grad():
        logp = torch.cat([z["shared"], z["l"]]).log_softmax(-1)
        p = logp[torch.arange(6), [1, 2, 3, 4, 0, 3]].mean().exp()
    torch.testing.assert_close(g, (1 - 0.4 * p) * mle, rtol=1e-10, atol=1e-14)


def test_the_reference_is_ignored():
    np.testing.assert_array_equal(values(build("exmate"), pairs()), values(build("exmate"), ref_randomised(pairs())))
