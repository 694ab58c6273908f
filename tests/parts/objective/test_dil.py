"""Oracle of objective/dil: its three forms in float64 numpy, the authors' code, and their minimisers on tables.

Bugs it is meant to catch: sums for means, a missing factor of LSIF, the branches exchanged, no clamp.
"""

import numpy as np
import pytest
import torch
from _pairwise import (
    all_pairs,
    at_reference,
    build,
    letters,
    loss_of,
    minimised,
    of,
    pairs,
    sig,
    slopes,
    softplus,
    total_variation,
    values,
)

from metier.testing import check_part

BREGMAN = ("lsif", "ukl", "bce")


def test_contract():
    check_part("objective/dil")


def expected(f, w, l):  # noqa: E741
    """Loss and its slopes by both log-ratios."""
    if f == "lsif":
        return -np.exp(w) + np.exp(l) ** 2 / 2, -np.exp(w), np.exp(2 * l)
    if f == "ukl":
        return -w + np.exp(l), -np.ones_like(w), np.exp(l)
    return softplus(-w) + softplus(l), sig(w) - 1, sig(l)


@pytest.mark.parametrize("f", BREGMAN)
@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("beta", [1.0, 0.3])
def test_formulas_and_gradients(f, average, beta):
    b, x = pairs(scale=1.0), letters(pairs(scale=1.0))
    nw, nl = (x.nw, x.nl) if average else (np.ones(6), np.ones(6))
    loss, d_w, d_l = expected(f, beta * x.Dw / nw, beta * x.Dl / nl)
    objective = build("dil", f=f, average=average, beta=beta)
    np.testing.assert_allclose(values(objective, b), loss, rtol=1e-12)
    g_w, g_l = slopes(objective, b)
    np.testing.assert_allclose(g_w, beta * d_w / nw, rtol=1e-12)
    np.testing.assert_allclose(g_l, beta * d_l / nl, rtol=1e-12)
    assert (g_w < 0).all()
    assert (g_l > 0).all()


@pytest.mark.parametrize(("f", "start"), [("lsif", -0.5), ("ukl", 1.0), ("bce", 2 * np.log(2))])
def test_at_the_reference(f, start):
    np.testing.assert_allclose(values(build("dil", f=f), at_reference(pairs())), start, rtol=1e-12)


RECORDED = {
    "lsif": [-0.8631371, 0.12218663, -0.79686487, -0.94319372],
    "ukl": [3.24648172, 3.90850461, 2.71733742, 3.28456276],
    "bce": [1.21142093, 1.66428427, 1.24818195, 1.20876522],
}


@pytest.mark.parametrize("f", BREGMAN)
def test_as_the_authors_code(f):
    """Recorded from ``dpo_loss`` of tengxiao1/DIL 0bf8bdc1 on token means; its UKL lacks ``log π_ref(y_w)``."""
    b = of(
        [-12.0, -30.5, -7.25, -21.0], [-15.0, -22.5, -9.5, -20.0], [5.0, 12.0, 4.0, 9.0], [6.0, 8.0, 5.0, 10.0],
        [-13.0, -28.0, -8.0, -24.0], [-14.0, -25.0, -9.0, -19.5],
    )  # fmt: skip
    constant = (b.ref_chosen_logps / b.chosen_len).numpy() if f == "ukl" else 0.0
    np.testing.assert_allclose(values(build("dil", f=f), b) - constant, RECORDED[f], atol=1e-8)


def test_bce_is_bco_pair():
    ours = values(build("dil", f="bce", average=False, beta=0.2), pairs())
    np.testing.assert_allclose(ours, values(build("bco-pair", beta=0.2), pairs()), rtol=1e-12)
    pytest.importorskip("trl")
    from _pairwise import trl_dpo

    assert ours.mean() == pytest.approx(trl_dpo(pairs(), "bco_pair", beta=0.2).item(), rel=1e-9)


def test_exponentials_are_clamped():
    far = of([0.0], [0.0], rw=[-300.0], rl=[-300.0])
    assert values(build("dil", f="lsif"), far)[0] == pytest.approx(-np.exp(20) + np.exp(20) / 2)
    assert values(build("dil", f="ukl"), far)[0] == pytest.approx(-300 + np.exp(20))
    assert slopes(build("dil", f="lsif"), far) == (0.0, 0.0)


# --- tables ------------------------------------------------------------------------------------------------------

torch.manual_seed(5)
CHOSEN, REJECTED, MU = ((s * torch.randn(3, 4, dtype=torch.float64)).log_softmax(-1) for s in (1.0, 1.0, 0.7))


def optimum(f, rejected):
    """Minimiser for one-token answers, chosen from ``CHOSEN`` and rejected from ``rejected``, reference ``MU``."""

    def loss(logp):
        b, x, w, r = all_pairs(logp, MU)
        return (loss_of(build("dil", f=f), b) * (CHOSEN[x, w] + rejected[x, r]).exp()).sum()

    return minimised(loss, MU)


@pytest.mark.parametrize("f", BREGMAN)
def test_with_rejected_answers_from_the_reference_the_optimum_is_the_chosen_distribution(f):
    assert total_variation(MU, CHOSEN) > 0.2
    assert total_variation(optimum(f, MU), CHOSEN) < 1e-3


def test_ukl_with_other_rejected_answers():
    """``π = p_c/(p_r/μ + ν)``, ν so that it sums to 1."""
    found = optimum("ukl", REJECTED)
    ratio, p = (REJECTED - MU).exp(), CHOSEN.exp()
    low, high = -ratio.min(-1, keepdim=True).values + 1e-12, torch.full((3, 1), 100.0, dtype=torch.float64)
    for _ in range(200):
        middle = (low + high) / 2
        too_much = (p / (ratio + middle)).sum(-1, keepdim=True) > 1
        low, high = torch.where(too_much, middle, low), torch.where(too_much, high, middle)
    assert total_variation(found, (p / (ratio + low)).log()) < 1e-3
    assert total_variation(found, CHOSEN) > 0.05
