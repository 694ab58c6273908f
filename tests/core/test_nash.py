"""Cycles, Condorcet winners and Nash policies: brute force over small games, closed forms, theorems on random games.

Bugs it is meant to catch: rows and columns of the matrix exchanged, ties counted as wins, a mixture with the wrong exponent, a step
on the policy instead of the mixture, voters' ranks read as orders.
"""

from itertools import permutations, product

import numpy as np
import pytest
from scipy import special

from metier.core import nash as games
from metier.core.errors import UsageError

ROCK = np.array([[0.5, 0.7, 0.3], [0.3, 0.5, 0.7], [0.7, 0.3, 0.5]])


def random_game(n, rng, ties=0.0):
    p = np.triu(np.where(rng.random((n, n)) < ties, 0.5, rng.random((n, n))), 1)
    return p + np.tril(1 - p.T, -1) + 0.5 * np.eye(n)


def bradley_terry(r):
    return special.expit(np.subtract.outer(r, r))


def kl(a, b):
    return float((a * np.log(a / b)).sum())


# --- majorities ------------------------------------------------------------------------------------------------------


def brute_cycle(p):
    """Any directed cycle, by trying all sequences."""
    return any(
        all(p[c[i], c[(i + 1) % k]] > 0.5 for i in range(k)) for k in range(2, len(p) + 1) for c in permutations(range(len(p)), k)
    )


@pytest.mark.parametrize("ties", [0.0, 0.4])
def test_majorities_against_brute_force(ties):
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(60):
        p = random_game(5, rng, ties)
        cyclic = brute_cycle(p)
        assert games.has_cycle(p) == cyclic
        if not ties:
            assert bool(games.cycles(p)) == cyclic == (not games.representable(p))
        assert all(p[a, b] > 0.5 and p[b, c] > 0.5 and p[c, a] > 0.5 for a, b, c in games.cycles(p))
        best = [i for i in range(5) if all(p[i, j] > 0.5 for j in range(5) if j != i)]
        worst = [i for i in range(5) if all(p[i, j] < 0.5 for j in range(5) if j != i)]
        assert [games.winner(p)] == (best or [None])
        assert [games.loser(p)] == (worst or [None])
        sets = [
            s for s in map(list, _subsets(5)) if all(p[i, j] > 0.5 for i in s for j in range(5) if j not in s)
        ]  # fmt: skip
        assert games.smith_set(p) == min(sets, key=len)
        levels = any(
            all((p[i, j] > 0.5) == (r[i] > r[j]) for i in range(5) for j in range(5) if i != j) for r in _levels()
        )  # fmt: skip
        assert games.representable(p) == levels
        seen.add((cyclic, bool(best), levels))
    assert len(seen) >= 3


def _subsets(n):
    return [[i for i in range(n) if k >> i & 1] for k in range(1, 2**n)]


def _levels():
    return list(product(range(5), repeat=5))


def test_number_of_cycles_of_three():
    """A regular tournament of five has the most there can be: five."""
    p = np.full((5, 5), 0.5)
    for i in range(5):
        for k in (1, 2):
            p[i, (i + k) % 5], p[(i + k) % 5, i] = 0.9, 0.1
    assert len(games.cycles(p)) == 5
    assert games.smith_set(p) == [0, 1, 2, 3, 4]
    assert games.cycles(ROCK) == [(0, 1, 2)]


# --- rewards ---------------------------------------------------------------------------------------------------------


def test_rock_paper_scissors():
    """Nash is uniform, the Bradley-Terry rewards are equal (so that RLHF and DPO return μ), nothing is explained."""
    np.testing.assert_allclose(games.nash(ROCK), 1 / 3, atol=1e-9)
    np.testing.assert_allclose(games.bt_fit(100 * (ROCK - 0.5 * np.eye(3))), 0, atol=1e-9)
    assert games.hodge_residual(ROCK)[1] == pytest.approx(1.0)
    assert not games.representable(ROCK)
    assert games.winner(ROCK) is None
    assert games.worst_win_rate(ROCK, np.full(3, 1 / 3)) == pytest.approx(0.5)
    assert games.worst_win_rate(ROCK, [1.0, 0, 0]) == pytest.approx(0.3)


def test_bradley_terry_preferences_are_explained_wholly():
    r = np.array([0.3, -1.0, 2.0, 0.1])
    p = bradley_terry(r)
    found, residual = games.hodge_residual(p)
    np.testing.assert_allclose(found, r - r.mean(), atol=1e-9)
    assert residual == pytest.approx(0, abs=1e-12)
    np.testing.assert_allclose(games.bt_fit(p), r - r.mean(), atol=1e-5)
    counts = np.array([[0, 30, 4, 11.0]] * 4) * (1 - np.eye(4))
    np.testing.assert_allclose(games.bt_fit((counts + counts.T) * p), r - r.mean(), atol=1e-5)
    weights = np.ones((4, 4))
    weights[0, 1] = weights[1, 0] = 0  # never compared: its log-odds may be anything
    spoilt = p.copy()
    spoilt[0, 1], spoilt[1, 0] = 0.01, 0.99
    np.testing.assert_allclose(games.hodge_residual(spoilt, weights=weights)[0], r - r.mean(), atol=1e-9)


def test_residual_of_a_mixture_of_both():
    """Log-odds are a gradient plus a cycle, and these are orthogonal."""
    r, c = np.array([1.0, 0, -1]), 0.8
    cycle = c * (np.roll(np.eye(3), 1, 1) - np.roll(np.eye(3), -1, 1))
    flow = np.subtract.outer(r, r) + cycle
    assert games.hodge_residual(special.expit(flow))[1] == pytest.approx((cycle**2).sum() / (flow**2).sum())


def test_counts_become_probabilities():
    p = games.from_wins([[0, 3, 0], [1, 0, 0], [0, 0, 0]])
    np.testing.assert_allclose(p, [[0.5, 0.75, 0.5], [0.25, 0.5, 0.5], [0.5, 0.5, 0.5]])
    assert games.from_wins([[0, 3.0], [1, 0]], prior=0.5)[0, 1] == pytest.approx(3.5 / 5)


@pytest.mark.parametrize(
    "p", [[[0.5, 0.6], [0.6, 0.5]], [[0.5, 1.2], [-0.2, 0.5]], [[0.4, 0.5], [0.5, 0.5]], [[0.5]], [[0.5, 0.5]]]
)
def test_what_is_no_preference_matrix_is_refused(p):
    with pytest.raises(UsageError):
        games.nash(p)


# --- games -----------------------------------------------------------------------------------------------------------


def test_linear_program_gives_a_nash_policy_inside_the_smith_set():
    rng = np.random.default_rng(1)
    winners = 0
    for _ in range(60):
        p = random_game(5, rng)
        pi = games.nash(p)
        assert games.worst_win_rate(p, pi) == pytest.approx(0.5, abs=1e-7)
        assert set(np.flatnonzero(pi > 1e-9)) <= set(games.smith_set(p))
        best = games.winner(p)
        assert (pi.max() > 1 - 1e-9) == (best is not None)  # a point mass exactly when there is a Condorcet winner
        winners += best is not None
        assert best is None or pi[best] == pytest.approx(1.0)
    assert 10 < winners < 50


def test_a_transitive_order_gives_its_first():
    p = np.where(np.triu(np.ones((4, 4)), 1) > 0, 0.6, 0.4) + 0.1 * np.eye(4)
    np.testing.assert_allclose(games.nash(p), [1, 0, 0, 0], atol=1e-9)
    assert games.representable(p)


@pytest.mark.parametrize("tau", [0.02, 0.1, 1.0, 5.0])
def test_the_regularised_policy_is_the_fixed_point(tau):
    rng = np.random.default_rng(2)
    for _ in range(10):
        p, mu = random_game(5, rng), rng.dirichlet(np.ones(5)) * 0.9 + 0.02
        pi = games.regularised(p, mu, tau)
        again = mu * np.exp(p @ pi / tau)
        np.testing.assert_allclose(pi, again / again.sum(), atol=1e-10)


def test_the_regularised_policy_is_a_best_response_to_itself():
    """No other policy gains against it, by random search: the saddle of the regularised game."""
    rng = np.random.default_rng(3)
    p, mu, tau = random_game(4, rng), np.full(4, 0.25), 0.3
    star = games.regularised(p, mu, tau)
    value = star @ p @ star - tau * kl(star, mu)
    for pi in rng.dirichlet(np.ones(4), size=2000):
        assert pi @ p @ star - tau * kl(pi, mu) <= value + 1e-12


def test_linear_program_and_nash_md_with_a_small_tau():
    """Policies agree as games within 0.02: what the opponent can win at most. Their probabilities may differ more where a game
    is nearly degenerate; the difference vanishes with τ."""
    rng = np.random.default_rng(1)
    for _ in range(20):
        p = random_game(5, rng)
        exact, near = games.nash(p), [games.regularised(p, tau=t) for t in (0.01, 0.001)]
        assert games.worst_win_rate(p, near[0]) >= 0.5 - 0.02
        assert np.abs(near[1] - exact).max() <= max(0.25 * np.abs(near[0] - exact).max(), 1e-6)
    close = np.array([[0.5, 0.9, 0.2], [0.1, 0.5, 0.8], [0.8, 0.2, 0.5]])
    last = games.nash_md(close, tau=0.01, steps=20000)[-1]
    np.testing.assert_allclose(last, games.nash(close), atol=0.02)


def test_nash_md_keeps_to_its_bound_on_twenty_games():
    rng = np.random.default_rng(4)
    for i in range(20):
        p, mu = random_game(5, rng), rng.dirichlet(2 * np.ones(5))
        tau = (0.1, 0.3, 1.0)[i % 3]
        star, path = games.regularised(p, mu, tau), games.nash_md(p, mu, tau, 600)
        found = np.array([kl(star, pi) for pi in path])
        assert (found <= 8 / (tau**2 * (np.arange(601) + 1))).all()
        assert found[-1] < 1e-4


def test_the_last_iterate_is_a_fixed_point():
    p = random_game(5, np.random.default_rng(5))
    pi = games.nash_md(p, tau=0.1, steps=100_000)[-1]
    again = np.exp(p @ pi / 0.1)
    assert np.abs(pi - again / again.sum()).max() < 1e-4


def test_one_step_by_hand():
    p, mu, start = ROCK, np.array([0.2, 0.3, 0.5]), np.array([0.6, 0.3, 0.1])
    eta, tau = 0.4, 0.5
    mixed = start ** (1 - eta * tau) * mu ** (eta * tau)
    mixed /= mixed.sum()
    new = mixed * np.exp(eta * p @ mixed)
    np.testing.assert_allclose(games.nash_md(p, mu, tau, 1, eta=eta, start=start)[1], new / new.sum(), atol=1e-12)
    plain = start * np.exp(eta * p @ start)
    np.testing.assert_allclose(games.self_play(p, mu, 1, eta=eta, start=start)[1], plain / plain.sum(), atol=1e-12)


@pytest.mark.parametrize("eta", [0.1, 0.5, 1.0])
def test_self_play_runs_in_circles(eta):
    """With the same constant step its last iterate is at least twice as far away."""
    start, star = np.array([0.6, 0.3, 0.1]), np.full(3, 1 / 3)
    with_mixture = games.nash_md(ROCK, tau=0.1, steps=500, eta=eta, start=start)[-1]
    without = games.self_play(ROCK, steps=500, eta=eta, start=start)
    assert kl(star, without[-1]) > 2 * kl(star, with_mixture)
    assert kl(star, without[-1]) > kl(star, without[0])
    assert len(set(without.argmax(1))) == 3  # every answer has its turn


# --- voters ----------------------------------------------------------------------------------------------------------


def test_three_voters_and_three_answers():
    """1/18 of the 216 profiles have a cycle, by enumeration and by simulation."""
    ranks = np.array(list(permutations(range(3))))
    profiles = np.array([(a, b, c) for a in ranks for b in ranks for c in ranks])
    p = games.majority(profiles)
    assert np.mean([games.has_cycle(x) for x in p]) == pytest.approx(1 / 18)
    assert games.cycle_probability(3, 3, 60_000)[0] == pytest.approx(1 / 18, abs=0.003)
    assert p[0, 0, 0] == 0.5
    assert (profiles[7, :, 0] < profiles[7, :, 1]).mean() == p[7, 0, 1]


@pytest.mark.parametrize(
    ("n", "cyclic", "headless"),
    [(3, 0.06, 0.06), (4, 0.17, 0.12), (6, 0.49, 0.20), (8, 0.77, 0.25), (10, 0.91, 0.32), (12, 0.98, 0.36), (16, 0.999, 0.44)],
)
def test_cycles_of_three_voters(n, cyclic, headless):
    found = games.cycle_probability(n, 3, 6000, seed=n)
    assert found == pytest.approx((cyclic, headless), abs=0.03)


def test_even_voters_and_the_luce_model():
    few, _ = games.cycle_probability(4, 4, 500)
    exact = []
    rng = np.random.default_rng(0)
    for _ in range(500):
        order = np.array([rng.permutation(4) for _ in range(4)])
        exact.append(brute_cycle(games.majority(order[None])[0]))
    assert few == pytest.approx(np.mean(exact), abs=0.06)
    assert games.cycle_probability(6, 3, 2000, utilities=3.0 * np.arange(6))[0] < 0.05
