"""source/nash-rs: what is taken is distributed as the mirror step of Nash-MD.

Bugs it is meant to catch: acceptance above 1, the exponent's sign, policy instead of mixture, win rates of the wrong side.
"""

import numpy as np
import pytest
from _answering import build, prompted, prompts_file, rows_of, word_run
from _duels import Game, P, said

from metier import train
from metier.core import nash
from metier.core.sample import Answer
from metier.parts.source.nash_rs import acceptance
from metier.testing import check_part

NAMES = ("rock", "paper", "scissors")
MATRIX = np.array([[P.get((a, b), 0.5) for b in NAMES] for a in NAMES])


def test_contract():
    check_part("source/nash-rs")


def source(**options):
    made = build("nash-rs", judge="length", pairwise=True, **options)
    made.judge = type(made.judge)(Game(), True, 1.0)
    return made


@pytest.mark.parametrize("eta", [0.1, 1.0, 8.0])
def test_acceptance_is_a_probability_proportional_to_the_mirror_step(eta):
    p = np.linspace(0, 1, 11)
    taken = np.array([acceptance(x, eta) for x in p])
    assert ((taken > 0) & (taken <= 1)).all()
    np.testing.assert_allclose(taken / taken[0], np.exp(eta * (p - p[0])))
    assert acceptance(1.0, eta) == 1


class Tabular:
    """A policy over three answers; its mixture is the geometric one, as it is on one token."""

    def __init__(self, pi, mu):
        self.pi, self.mu = np.array(pi), np.array(mu)

    def sample(self, prompts, number, *, max_new_tokens, seed, mixed=0.0):
        p = self.pi ** (1 - mixed) * self.mu**mixed
        drawn = np.random.default_rng(seed).choice(3, (len(prompts), number), p=p / p.sum())
        return [[Answer(np.zeros(1, np.int32), NAMES[i], True, np.zeros(1, np.float32)) for i in row] for row in drawn]


def test_what_is_taken_is_one_step_of_nash_md():
    pi, mu, eta, tau = np.array([0.6, 0.3, 0.1]), np.array([0.2, 0.3, 0.5]), 2.0, 0.15
    policy = Tabular(pi, mu)
    made = source(kappa=eta * tau, eta=eta, number=20, opponents=60).round(
        prompted(250), policy=policy, round=0, rng=np.random.default_rng(0)
    )
    seen = np.array([sum(e.completion == n for e in made) for n in NAMES]) / len(made)
    step = nash.nash_md(MATRIX, mu, tau, 1, eta=eta, start=pi)[1]
    np.testing.assert_allclose(seen, step, atol=0.03)
    assert np.abs(step - pi).max() > 0.1
    mixed = pi ** (1 - eta * tau) * mu ** (eta * tau)
    mixed /= mixed.sum()
    assert len(made) / 5000 == pytest.approx(float(mixed @ np.exp(eta * (MATRIX @ mixed - 1))), abs=0.02)


def test_repeated_it_converges_to_the_regularised_nash_policy():
    mu, eta, tau = np.array([0.5, 0.3, 0.2]), 1.0, 0.25
    pi, rng, path = mu, np.random.default_rng(1), []
    for _ in range(30):
        made = source(kappa=eta * tau, eta=eta, number=16, opponents=64).round(
            prompted(100), policy=Tabular(pi, mu), round=0, rng=rng
        )
        pi = np.array([sum(e.completion == n for e in made) + 1e-3 for n in NAMES])
        pi = pi / pi.sum()
        path.append(pi)
    np.testing.assert_allclose(np.mean(path[15:], axis=0), nash.regularised(MATRIX, mu, tau), atol=0.03)


def test_both_sides_come_from_the_mixture_and_rows_say_the_win_rate():
    policy = said(own=["rock", ("paper", False), ""], others=["paper", "scissors"])
    made = source(eta=1e-9, kappa=0.25, number=3, opponents=2).round(
        prompted(2), policy=policy, round=0, rng=np.random.default_rng(0)
    )
    assert [(c["number"], c["mixed"]) for c in policy.calls] == [(3, 0.25), (2, 0.25)]
    assert policy.calls[0]["seed"] != policy.calls[1]["seed"]
    assert [e.completion for e in made] == ["rock", "rock"]
    assert made[0].meta["win_rate"] == pytest.approx((P["rock", "paper"] + P["rock", "scissors"]) / 2)
    assert {e.prompt for e in made} == {"p0", "p1"}


def test_a_run(tmp_path):
    options = {"judge": "length", "prompts": 8, "number": 4, "opponents": 2, "max_new_tokens": 24, "kappa": 0.2}
    result = train(
        word_run(prompts_file(tmp_path), {"nash-rs": options}, "lm", steps=5, batch=4), out=tmp_path / "run", quiet=True
    )
    assert result.status == "done"
    rows = rows_of(tmp_path / "run", 1)
    assert all(0 <= r["win_rate"] <= 1 for r in rows)
    assert rows != rows_of(tmp_path / "run", 2)
