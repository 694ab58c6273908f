"""Oracle of objective/typo: formula in float64 numpy, and what the card says of its minimisers on tables.

Bugs it is meant to catch: the KL in the other direction or with the other sign, τ multiplied, means for sums, a reference in
the pair term, missing samples counted.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from _pairwise import (
    all_pairs,
    build,
    letters,
    loss_of,
    minimised,
    of,
    pairs,
    ref_randomised,
    sig,
    slopes,
    softplus,
    total_variation,
    values,
)

from metier.core.batch import Pairs
from metier.testing import check_part


def test_contract():
    check_part("objective/typo")


@pytest.mark.parametrize(("lam", "tau"), [(0.1, 1.0), (2.0, 3.0), (0.0, 0.5)])
def test_formula_and_its_gradient(lam, tau):
    b, x = pairs(samples=3), letters(pairs(samples=3))
    kl = (b.ref_sampled_logps - b.sampled_logps).numpy().mean(1)
    np.testing.assert_allclose(values(build("typo", lam=lam, tau=tau), b), softplus(-x.m / tau) + lam * kl, rtol=1e-12)
    g_w, g_l = slopes(build("typo", lam=lam, tau=tau), b)
    np.testing.assert_allclose(g_w, -sig(-x.m / tau) / tau, rtol=1e-12)
    np.testing.assert_allclose(g_l, sig(-x.m / tau) / tau, rtol=1e-12)


def test_gradient_of_the_samples():
    """The likelihood of what the reference says is raised."""
    b = pairs(samples=4)
    b.sampled_logps.requires_grad_()
    loss_of(build("typo", lam=0.3), b).sum().backward()
    np.testing.assert_allclose(b.sampled_logps.grad.numpy(), -0.3 / 4)


def test_without_scores_of_the_reference_only_a_constant_is_missing():
    b = pairs(samples=2)
    bare = replace(b, ref_sampled_logps=None)
    missing = values(build("typo"), b) - values(build("typo"), bare)
    np.testing.assert_allclose(missing, 0.1 * b.ref_sampled_logps.numpy().mean(1), rtol=1e-9)
    assert "kl" in build("typo")(b)[1]
    assert "cross_entropy" in build("typo")(bare)[1]


def test_samples_that_do_not_exist_are_left_out():
    b = pairs(samples=3)
    length = b.sampled_len.clone()
    length[1, 2] = 0
    kl = build("typo")(replace(b, sampled_len=length))[1]["kl"][1].item()
    assert kl == pytest.approx((b.ref_sampled_logps - b.sampled_logps)[1, :2].mean().item())


def test_needs():
    assert build("typo").needs == {"samples"}
    assert build("typo", lam=0.0).needs == frozenset()
    assert values(build("typo", lam=0.0), of([-2.0], [-2.0]))[0] == pytest.approx(np.log(2))


def test_without_divergence_it_is_the_pair_term_of_cpo():
    cpo = build("cpo", beta=1.0, c=0.0)
    np.testing.assert_allclose(values(build("typo", lam=0.0), pairs()), values(cpo, pairs()), rtol=1e-14)
    np.testing.assert_allclose(slopes(build("typo", lam=0.0), pairs()), slopes(cpo, pairs()), rtol=1e-14)


def test_the_pair_term_ignores_the_reference():
    np.testing.assert_array_equal(
        values(build("typo", lam=0.0), pairs()), values(build("typo", lam=0.0), ref_randomised(pairs()))
    )


# --- tables ------------------------------------------------------------------------------------------------------

torch.manual_seed(1)
REWARD = 1.5 * torch.randn(4, 4, dtype=torch.float64)
BEST = REWARD.log_softmax(-1)
MU = (2 * torch.randn(4, 4, dtype=torch.float64)).log_softmax(-1)


def population(name, mu, **options):
    """Expected loss over pairs with exact Bradley-Terry labels and one sample of μ, as a function of the policy's table."""
    objective = build(name, **options)

    def loss(logp):
        b, x, w, r = all_pairs(logp, mu)
        weight = torch.sigmoid(REWARD[x, w] - REWARD[x, r]) * (w != r)
        if "samples" in getattr(objective, "needs", ()):
            size = mu.shape[1]
            rows = torch.arange(len(x)).repeat_interleave(size)
            y = torch.arange(size).repeat(len(x))
            flat = {k: v[rows] for k, v in vars(b).items() if v is not None}
            sampled = {"sampled_logps": logp[x[rows], y][:, None], "ref_sampled_logps": mu[x[rows], y][:, None]}
            b = Pairs(**flat, **sampled, sampled_len=torch.ones(len(rows), 1))
            weight = weight[rows] * mu[x[rows], y].exp()
        return (loss_of(objective, b) * weight).sum() / 6  # six pairs a prompt

    return loss


def optimum(mu, lam):
    return minimised(population("typo", mu, lam=lam), torch.zeros(4, 4))


def test_it_interpolates_between_the_data_and_the_reference():
    """λ = 0: softmax(r), whatever μ; λ large: μ; between, the distance to μ falls."""
    distances = [total_variation(optimum(MU, lam), MU) for lam in (0.0, 0.1, 1.0, 10.0, 1000.0)]
    assert total_variation(optimum(MU, 0.0), BEST) < 1e-3
    assert distances == sorted(distances, reverse=True)
    assert distances[0] > 0.2
    assert distances[-1] < 1e-2


def test_it_preserves_where_the_reference_is_right_and_dpo_does_not():
    mu = torch.cat([BEST[:2], MU[2:]])
    for lam in (0.01, 0.3, 10.0):
        found = optimum(mu, lam)
        assert total_variation(found[:2], BEST[:2]) < 1e-3
        assert total_variation(found[2:], mu[2:]) > 5e-3
    for beta in (1.0, 0.5):
        found = minimised(population("dpo", mu, beta=beta), mu)
        assert total_variation(found, (mu + REWARD / beta).log_softmax(-1)) < 1e-3
        assert total_variation(found[:2], BEST[:2]) > 0.05


def test_the_divergence_is_estimated_without_bias():
    mu, logp = MU[0], BEST[0]
    exact = (mu.exp() * (mu - logp)).sum().item()
    drawn = torch.multinomial(mu.exp(), 100_000, replacement=True, generator=torch.Generator().manual_seed(0)).view(1000, 100)
    ones = torch.ones(1000, dtype=torch.float64)
    b = Pairs(-ones, -ones, ones, ones, sampled_logps=logp[drawn], ref_sampled_logps=mu[drawn], sampled_len=torch.ones(1000, 100))
    kl = build("typo")(b)[1]["kl"]
    error = (mu - logp)[drawn].std().item() / 100_000**0.5
    assert abs(kl.mean().item() - exact) < 3 * error
    assert exact > 100 * error
