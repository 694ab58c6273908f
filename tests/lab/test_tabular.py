"""The tabular bench: losses summed by hand in numpy, and the closed-form optima of the cards.

Bugs it is meant to catch: chosen and rejected exchanged in the weights, a pair counted twice or with itself, gradients through a
detached score.
"""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from metier.core.batch import Lists, Pairs, Rated, Rewards
from metier.core.errors import UsageError
from metier.lab.tabular import bradley_terry, kl, minimise, population_loss, random_bench, total_variation, win_rate

BENCH = random_bench(prompts=4, answers=4, seed=1, longest=5)
TABLE = torch.randn(4, 4, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def softplus(x):
    return np.logaddexp(0, x)


def test_the_population_loss_is_the_sum_over_ordered_pairs():
    lp, ref, r = (v.numpy() for v in (TABLE.log_softmax(1), BENCH.reference, BENCH.gold))
    total = pairs = 0.0
    for x, (i, j) in itertools.product(range(4), itertools.permutations(range(4), 2)):
        p = 1 / (1 + np.exp(r[x, j] - r[x, i]))
        h = lp[x, i] - ref[x, i] - lp[x, j] + ref[x, j]
        total, pairs = total + p * softplus(-0.3 * h), pairs + p
    assert float(population_loss({"dpo": {"beta": 0.3}}, TABLE, BENCH)) == pytest.approx(total / pairs, rel=1e-12)


def test_weights():
    for sampling, flip in itertools.product(("uniform", "reference"), (0.0, 0.3)):
        w = BENCH.weights(sampling=sampling, flip=flip)
        assert float(w.sum()) == pytest.approx(1)
        assert torch.diagonal(w, dim1=1, dim2=2).abs().max() == 0
        both = w + w.transpose(1, 2)
        labels = (1 - flip) * BENCH.preference + flip * (1 - BENCH.preference)
        torch.testing.assert_close(w, both * labels)
        p = BENCH.reference.exp() if sampling == "reference" else torch.ones(4, 4, dtype=torch.float64)
        ratio = both[:, 0, 1] / both[:, 2, 3]
        torch.testing.assert_close(ratio, p[:, 0] * p[:, 1] / (p[:, 2] * p[:, 3]))
    counted = BENCH.sampled(200_000, seed=3)
    assert float((counted - BENCH.weights()).abs().max()) < 5 * np.sqrt(0.02 / 200_000)
    assert torch.equal(counted, BENCH.sampled(200_000, seed=3))


@pytest.mark.parametrize(("method", "steps"), [("lbfgs", 500), ("adam", 1500), ("gd", 2000)])
@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_dpo_finds_the_tilted_reference(method, steps, beta):
    bench = random_bench(prompts=3, answers=5, seed=2)
    lr = {"gd": 3.0 / beta, "adam": None, "lbfgs": None}[method]
    fit = minimise({"dpo": {"beta": beta}}, bench, method=method, steps=steps, lr=lr)
    p = np.exp(bench.reference.numpy() + bench.gold.numpy() / beta)
    p /= p.sum(1, keepdims=True)
    np.testing.assert_allclose(bench.optimum(beta).exp().numpy(), p)
    assert total_variation(fit.policy, bench.optimum(beta)).max() < 1e-3
    assert abs(bench.regret(fit.policy, beta)) < 1e-4


def test_ipo_of_two_answers():
    bench = random_bench(prompts=5, answers=2, seed=3)
    fit = minimise({"ipo": {"tau": 0.4, "average": False}}, bench)
    h = (fit.policy - bench.reference).numpy()
    p = 1 / (1 + np.exp(bench.gold[:, 1] - bench.gold[:, 0]))
    np.testing.assert_allclose(h[:, 0] - h[:, 1], (p - 0.5) / 0.4, atol=1e-6)


def test_flipped_labels_are_undone_by_the_loss_that_knows_them():
    """Flips shrink what DPO finds; robust DPO's loss on flipped labels is DPO's on clean ones."""
    bench = random_bench(prompts=3, answers=4, seed=4)
    best = bench.optimum(0.5)
    plain = minimise({"dpo": {"beta": 0.5}}, bench, weights=bench.weights(flip=0.3))
    assert total_variation(plain.policy, best).max() > 0.05
    robust = minimise({"robust-dpo": {"beta": 0.5, "label_smoothing": 0.3}}, bench, weights=bench.weights(flip=0.3))
    assert total_variation(robust.policy, best).max() < 1e-3


def rated(b: Rated):
    return torch.where(b.label, -b.logps, 2.0 * b.logps)


def listed(b: Lists):
    assert b.present.all()
    return -(b.logps * b.score).sum(1)


def reward_model(b: Rewards):
    return torch.nn.functional.softplus(b.rejected - b.chosen)


reward_model.reads = Rewards


def test_other_batches():
    lp, r, w = TABLE.log_softmax(1).numpy(), BENCH.gold.numpy(), BENCH.weights().numpy()
    expected = (-lp * w.sum(2) + 2 * lp * w.sum(1)).sum() / 2
    assert float(population_loss(rated, TABLE, BENCH)) == pytest.approx(expected, rel=1e-12)
    assert float(population_loss(listed, TABLE, BENCH)) == pytest.approx(-(lp * r).sum(1).mean(), rel=1e-12)
    fit = minimise(reward_model, BENCH)
    gaps = [(v[:, :1] - v).numpy() for v in (fit.table, BENCH.gold)]
    np.testing.assert_allclose(*gaps, atol=1e-5)


def test_lengths_tokens_and_samples_are_given():
    seen = {}

    class Looks:
        reads, needs = Pairs, frozenset({"reference", "tokens", "samples", "collision"})

        def __call__(self, b):
            seen["batch"] = b
            return b.chosen_logps * 0

    population_loss(Looks(), TABLE, BENCH)
    b = seen["batch"]
    torch.testing.assert_close(b.tokens.logps[0::2], b.chosen_logps)
    torch.testing.assert_close(b.tokens.ref_logps[1::2], b.ref_rejected_logps)
    torch.testing.assert_close(b.tokens.collision[:2].exp(), (TABLE.softmax(1)[0] ** 2).sum().expand(2))
    assert b.sampled_logps.shape == (48, 256)
    mean = (BENCH.reference.exp() * BENCH.reference).sum(1)
    torch.testing.assert_close(b.ref_sampled_logps.mean(1)[::12], mean, atol=0.02, rtol=0)
    assert set(b.chosen_len.tolist()) <= {1.0, 2.0, 3.0, 4.0, 5.0}


def test_state_is_observed_each_step_and_the_path_kept():
    class Counts:
        reads, needs = Pairs, frozenset()
        count = 0

        def __call__(self, b):
            assert b.ref_chosen_logps is None
            return -b.chosen_logps

        def observe(self, b):
            assert not b.chosen_logps.requires_grad
            self.count += 1

    objective = Counts()
    fit = minimise(objective, BENCH, method="gd", steps=10, every=5, start=TABLE)
    assert objective.count == 11
    assert len(fit.path) == 3
    torch.testing.assert_close(fit.path[0], TABLE.log_softmax(1))
    assert torch.equal(fit.path[-1], fit.policy)


def test_distances_and_regret():
    p, q = TABLE.log_softmax(1), BENCH.reference
    a, b = p.exp().numpy(), q.exp().numpy()
    np.testing.assert_allclose(total_variation(p, q).numpy(), abs(a - b).sum(1) / 2)
    np.testing.assert_allclose(kl(p, q).numpy(), (a * np.log(a / b)).sum(1))
    point = torch.tensor([[0.0, -torch.inf]], dtype=torch.float64)
    assert float(kl(point, torch.tensor([[0.5, 0.5]], dtype=torch.float64).log())) == pytest.approx(np.log(2))
    beta, r = 0.7, BENCH.gold.numpy()
    value = (a * r).sum(1) - beta * (a * np.log(a / b)).sum(1)
    best = beta * np.log((b * np.exp(r / beta)).sum(1))
    assert BENCH.regret(p, beta) == pytest.approx((best - value).mean())
    assert BENCH.regret(p) == pytest.approx((r.max(1) - (a * r).sum(1)).mean())


def test_a_cycle_has_no_winner():
    """Rock, scissors, paper: the uniform policy beats nobody and loses to nobody."""
    beats = torch.tensor([[[0.5, 1, 0], [0, 0.5, 1], [1, 0, 0.5]]], dtype=torch.float64)
    bench = replace(random_bench(1, 3), preference=beats)
    even = torch.full((1, 3), 1 / 3, dtype=torch.float64).log()
    assert float(win_rate(even, bench.reference, beats)) == pytest.approx(0.5)
    fit = minimise({"dpo": {"beta": 1.0}}, bench)
    assert total_variation(fit.policy, bench.reference).max() < 1e-6
    assert torch.equal(bradley_terry(torch.zeros(1, 3)), torch.full((1, 3, 3), 0.5))


def test_what_a_table_cannot_say_is_refused():
    for name in ("lm", "classify"):
        with pytest.raises(UsageError, match="about preferences"):
            population_loss(name, TABLE, BENCH)
