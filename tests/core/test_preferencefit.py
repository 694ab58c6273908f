"""Sparse logistic regressions of choices: statsmodels and scipy as judges, quadrature for the posterior, planted truths.

Bugs it is meant to catch: an intercept, a penalty of 2/scale, a sampler of another density, columns chosen on held-out pairs,
explained variation against the wrong null, Elo in another base, a bias of place that does not cancel.
"""

import numpy as np
import pytest
import statsmodels.api as sm
from scipy import optimize, special

from metier.core import preferencefit as fit
from metier.core.errors import UsageError


def planted(seed, pairs=4000, p=29, active=8):
    """Signs, choices and weights: ``active`` of ``p`` are not zero."""
    rng = np.random.default_rng(seed)
    d = rng.choice([-1.0, 0.0, 1.0], size=(pairs, p))
    alpha = np.zeros(p)
    alpha[rng.permutation(p)[:active]] = rng.choice([-1, 1], active) * rng.uniform(0.3, 1.0, active)
    y = (rng.random(pairs) < special.expit(d @ alpha)).astype(float)
    return d, y, alpha


def small(seed=0, pairs=60, p=3):
    rng = np.random.default_rng(seed)
    d = rng.choice([-1.0, 0.0, 1.0], size=(pairs, p))
    return d, (rng.random(pairs) < special.expit(d @ np.array([0.8, -0.5, 0.0])[:p])).astype(float)


# --- fits ------------------------------------------------------------------------------------------------------------


def test_without_a_penalty_it_is_the_logit_of_statsmodels():
    d, y, _ = planted(0, pairs=800, p=6, active=3)
    found = sm.Logit(y, d).fit(disp=0, tol=1e-12)
    np.testing.assert_allclose(fit.logistic(d, y), found.params, atol=1e-7)


def test_weights_are_repetitions_and_shares_are_both_choices():
    d, y, _ = planted(1, pairs=300, p=4, active=2)
    counts = np.random.default_rng(0).integers(0, 4, len(y))
    np.testing.assert_allclose(
        fit.logistic(d, y, weights=counts, l2=0.3), fit.logistic(np.repeat(d, counts, 0), np.repeat(y, counts), l2=0.3), atol=1e-8
    )
    np.testing.assert_allclose(
        fit.logistic(d, np.full(len(y), 0.25)),
        fit.logistic(np.repeat(d, 4, 0), np.tile([1.0, 0, 0, 0], len(y))),
        atol=1e-8,
    )


@pytest.mark.parametrize("scale", [0.02, 0.1, 1.0])
def test_the_mode_is_the_minimum_of_the_penalised_likelihood(scale):
    """Split into positive and negative parts, the problem is smooth: an independent bounded minimiser finds the same."""
    d, y = small(pairs=200)

    def value(ab):
        z = d @ (ab[:3] - ab[3:])
        return np.logaddexp(0, z).sum() - y @ z + ab.sum() / scale

    best = optimize.minimize(value, np.zeros(6), bounds=[(0, None)] * 6, method="L-BFGS-B", options={"ftol": 1e-15, "gtol": 1e-9})
    np.testing.assert_allclose(fit.l1_logistic(d, y, scale=scale), best.x[:3] - best.x[3:], atol=2e-5)


def test_conditions_of_the_minimum():
    d, y, _ = planted(2)
    alpha = fit.l1_logistic(d, y, scale=0.1)
    slope = d.T @ (special.expit(d @ alpha) - y)
    active = alpha != 0
    np.testing.assert_allclose(slope[active], -np.sign(alpha[active]) / 0.1, atol=1e-5)
    assert (np.abs(slope[~active]) <= 1 / 0.1 + 1e-6).all()
    assert 8 <= active.sum() < 29


@pytest.mark.parametrize("seed", range(3))
def test_planted_weights_are_recovered(seed):
    """8 of 29 weights, 4000 pairs: correlation >= 0.95, all signs, nulls below 0.1; by the mode and by the posterior mean."""
    d, y, truth = planted(seed)
    posterior = fit.posterior_mean(d, y, draws=120, warmup=60, seed=seed)
    for alpha in (fit.l1_logistic(d, y), posterior.mean):
        assert np.corrcoef(alpha, truth)[0, 1] >= 0.95
        assert (np.sign(alpha[truth != 0]) == np.sign(truth[truth != 0])).all()
        assert np.abs(alpha[truth == 0]).max() < 0.1
    assert posterior.rhat < 1.03
    assert posterior.ess > 200


def test_the_order_of_the_answers_does_not_matter():
    d, y, _ = planted(3, pairs=1000)
    np.testing.assert_allclose(fit.l1_logistic(-d, 1 - y), fit.l1_logistic(d, y), atol=1e-9)
    some = np.random.default_rng(0).random(len(y)) < 0.5
    turned = fit.l1_logistic(np.where(some[:, None], -d, d), np.where(some, 1 - y, y))
    np.testing.assert_allclose(turned, fit.l1_logistic(d, y), atol=1e-9)
    a, b = (fit.posterior_mean(*x, draws=4, warmup=5).draws for x in ((d, y), (-d, 1 - y)))
    np.testing.assert_allclose(a, b, atol=1e-6)  # later on rounding grows, since the step is tuned on what is seen


# --- the posterior ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.1, 0.5])
def test_posterior_against_quadrature(scale):
    d, y = small(pairs=60, p=2)
    axis = np.linspace(-2.5, 3.5, 601)
    a, b = np.meshgrid(axis, axis, indexing="ij")
    z = a[..., None] * d[:, 0] + b[..., None] * d[:, 1]
    log = (y * z - np.logaddexp(0, z)).sum(-1) - (np.abs(a) + np.abs(b)) / scale
    mass = np.exp(log - log.max())
    mass /= mass.sum()
    found = fit.posterior_mean(d, y, scale=scale, draws=1200, warmup=200, seed=1)
    mean = [float((mass * v).sum()) for v in (a, b)]
    sd = [float(np.sqrt((mass * (v - m) ** 2).sum())) for v, m in zip((a, b), mean, strict=True)]
    np.testing.assert_allclose(found.mean, mean, atol=0.01)
    np.testing.assert_allclose(found.sd, sd, rtol=0.06)


def test_diagnostics_of_known_chains():
    rng = np.random.default_rng(0)
    free = rng.standard_normal((4, 1000, 2))
    assert fit.split_rhat(free) == pytest.approx([1, 1], abs=0.01)
    assert (np.abs(fit.effective(free) / 4000 - 1) < 0.3).all()
    slow = np.zeros_like(free)
    for t in range(1, 1000):
        slow[:, t] = 0.9 * slow[:, t - 1] + free[:, t] * np.sqrt(1 - 0.81)
    assert fit.effective(slow)[0] == pytest.approx(4000 / 19, rel=0.35)
    apart = free + np.array([0, 0, 3, 3])[:, None, None]
    assert fit.split_rhat(apart).min() > 1.5


def test_same_seed_same_draws_and_bootstrap_near_the_posterior():
    d, y, _ = planted(4, pairs=1500, p=6, active=3)
    a, b = (fit.posterior_mean(d, y, draws=50, seed=7) for _ in range(2))
    assert (a.draws == b.draws).all()
    fits = fit.bootstrap(d, y, draws=60, seed=1)
    assert (fits == fit.bootstrap(d, y, draws=60, seed=1)).all()
    np.testing.assert_allclose(fits.std(0), fit.posterior_mean(d, y, draws=400).sd, rtol=0.5)


def test_bootstrap_draws_clusters_together():
    """Ten copies of each pair under one name carry no more information than the pair."""
    d, y, _ = planted(5, pairs=150, p=3, active=2)
    many, names = (np.repeat(d, 10, 0), np.repeat(y, 10)), np.repeat(np.arange(len(y)), 10)
    apart = fit.bootstrap(*many, scale=10.0, draws=80).std(0)
    together = fit.bootstrap(*many, scale=10.0, draws=80, clusters=names).std(0)
    assert (together > 2 * apart).all()


# --- judges ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bonus", [-3.0, 0.0, 0.4, 10.0])
def test_a_bonus_for_the_first_place_cancels(bonus):
    rng = np.random.default_rng(0)
    quality = rng.normal(size=(200, 2))
    straight = quality + rng.normal(size=(200, 2)) * 0.1
    turned = quality[:, ::-1] + rng.normal(size=(200, 2)) * 0.1
    plain, place = fit.order_averaged(straight, turned), np.array([bonus, 0])
    assert (fit.order_averaged(straight + place, turned + place) == plain).all()
    assert plain.mean() == pytest.approx((quality[:, 0] > quality[:, 1]).mean(), abs=0.05)
    assert fit.order_averaged([[1, 0]], [[1, 0]]).tolist() == [0.5]  # only the place decided
    assert fit.order_averaged([[1, 0]], [[0, 1]]).tolist() == [1.0]


def test_similarity_is_averaged_over_groups():
    a, b = np.array([[1.0, 2, 3], [1, 2, 4]]), np.array([[2.0, 4, 6], [-1, -2, -4]])
    assert fit.similarity(a, b) == pytest.approx(0.0)
    assert fit.similarity(a[0], b[0]) == pytest.approx(1.0)
    with pytest.raises(UsageError, match="no correlation"):
        fit.similarity([1.0], [2.0])


def test_best_first():
    values = np.array([[1.0, 5], [3, 1], [2, 9]])
    assert fit.best_first(values, [1.0, 0.0]).tolist() == [1, 2, 0]
    assert fit.best_first(values, [-1.0, 0.0]).tolist() == [0, 2, 1]
    assert fit.best_first(values, [0.0, 1.0]).tolist() == [2, 0, 1]
    assert fit.best_first(values, [0.0, 0.0]).tolist() == [0, 1, 2]


# --- few columns -----------------------------------------------------------------------------------------------------


def latent(seed, pairs=5000, latents=12, each=25):
    """300 granular features, noisy copies of 12 latent categories, and choices from the latents."""
    rng = np.random.default_rng(seed)
    z = rng.choice([-1.0, 0.0, 1.0], size=(pairs, latents), p=[0.35, 0.3, 0.35])
    weights = rng.choice([-1, 1], latents) * rng.uniform(0.5, 1.2, latents)
    noise = np.concatenate([[0.05], np.linspace(0.1, 0.5, each - 1)])
    columns = [
        np.where(rng.random(pairs) < e, rng.choice([-1.0, 0.0, 1.0], size=pairs), z[:, k]) for k in range(latents) for e in noise
    ]
    y = (rng.random(pairs) < special.expit(z @ weights)).astype(float)
    return np.array(columns).T, y, z, rng


@pytest.fixture(scope="module")
def granular():
    return latent(0)


def test_twelve_latent_categories_are_found_among_300(granular):
    m, y, z, _ = granular
    basis = fit.greedy(m, y, np.arange(len(y)) % 10 < 3)
    assert 10 <= len(basis.columns) <= 16
    assert basis.share >= 0.89
    matched = {k for k in range(12) for j in basis.columns if abs(np.corrcoef(m[:, j], z[:, k])[0, 1]) > 0.8}
    assert len(matched) >= 10
    assert (np.diff(basis.fitted) > 0).all()
    assert (np.diff(basis.coverage) >= 0).all()


def test_permuted_choices_explain_nothing(granular):
    m, y, _, rng = granular
    basis = fit.greedy(m, rng.permutation(y), np.arange(len(y)) % 10 < 3)
    assert abs(basis.full) < 0.01
    assert abs((basis.held_out or [0.0])[-1]) < 0.01
    assert len(basis.columns) <= 1


def test_held_out_choices_have_no_say(granular):
    m, y, *_ = granular
    m, out = m[:, :40], np.arange(len(y)) % 10 < 3
    plain, other = (fit.greedy(m, np.where(out & flip, 1 - y, y), out, most=2, target=2.0) for flip in (False, True))
    assert plain.columns == other.columns
    assert plain.fitted == other.fitted
    assert plain.held_out[-1] > 0 > other.held_out[-1]


def test_explained_variation_by_hand():
    d, y = np.array([[1.0], [1], [-1], [0]]), np.array([1.0, 0, 0, 1])
    a = 0.7
    deviance = -np.log(special.expit(a)) - np.log(special.expit(-a)) - np.log(special.expit(a)) - np.log(0.5)
    assert fit.explained(d, y, [a]) == pytest.approx(1 - deviance / (4 * np.log(2)))
    assert fit.explained(d, y, [0.0]) == 0
    assert fit.explained([[1.0]], [1.0], [50.0]) == pytest.approx(1.0)


def test_coverage_and_attribution_by_hand():
    m = np.array([[1, 1, 0], [1, -1, 0], [0, 0, 1], [-1, 1, 1]])
    y = np.array([1.0, 1, 0, 0])
    assert fit.coverage(m, y, [0]) == 0.75
    assert fit.coverage(m, y, [2]) == 0.0
    assert fit.coverage(m, y, [0, 1]) == 0.75
    assert fit.attributed(m, y, 0).tolist() == [True, True, False, True]
    assert fit.attributed(m, y, 1).tolist() == [True, False, False, False]
    assert fit.attributed(np.array([[1, 0], [1, 1], [-1, 0]]), [1.0, 1, 1], 0, alone=True).tolist() == [True, False, False]
    assert fit.attributed(m, y, 0, alpha=[1.0, 2.0, 1.0]).tolist() == [False, True, False, True]
    assert fit.attributed(m, y, 0, alpha=[-1.0, 1.0, 1.0]).tolist() == [False, False, False, False]


# --- ratings ---------------------------------------------------------------------------------------------------------


def test_elo_finds_the_planted_order_and_scale():
    rng = np.random.default_rng(0)
    truth = np.array([120.0, -80, 40, -200, 120 - 90])
    truth -= truth.mean()
    names = list("abcde")
    i, j = rng.integers(5, size=(2, 12000))
    i, j = i[i != j], j[i != j]
    wins = (rng.random(len(i)) < 1 / (1 + 10 ** ((truth[j] - truth[i]) / 400))).astype(float)
    found = fit.elo([names[k] for k in i], [names[k] for k in j], wins, names)
    assert np.argsort(found).tolist() == np.argsort(truth).tolist()
    np.testing.assert_allclose(found, truth, atol=20)
    assert found.mean() == pytest.approx(0)


def test_ratings_count_only_by_differences_and_stay_finite():
    first, second, won = ["a", "a", "b", "a"], ["b", "c", "c", "b"], np.array([1.0, 1, 1, 0.5])
    found = fit.elo(first, second, won, ["a", "b", "c"])
    assert found[0] > found[1] > found[2]
    assert np.isfinite(found).all()
    odds = 1 / (1 + 10 ** ((found[1] - found[0]) / 400))
    assert 1 / (1 + 10 ** ((found[1] + 1000 - found[0] - 1000) / 400)) == pytest.approx(odds)


@pytest.mark.parametrize(
    ("d", "y"), [(np.zeros(3), np.zeros(3)), (np.zeros((3, 1)), np.zeros(2)), (np.full((1, 1), np.nan), [1.0]), ([[1.0]], [2.0])]
)
def test_tables_that_do_not_fit_are_refused(d, y):
    with pytest.raises(UsageError):
        fit.l1_logistic(d, y)
