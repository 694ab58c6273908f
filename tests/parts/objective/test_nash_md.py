"""Oracle of objective/nash-md: the formula in numpy, trl's trainer line by line, exact gradients of the game on a table.

Bugs it is meant to catch: the log-ratio with a gradient, the sign of the KL term, sums for means over ragged lists, scores of absent
answers, tokens of one answer credited to another.

trl 1.16.0 as installed has no Nash-MD trainer; ``trl_loss`` restates ``_compute_losses`` of trl/experimental/nash_md at the
repository's main branch (score = (p - 0.5) Σ_t logp_t, loss = β Σ_t sg(logp_t - ref_t) logp_t - score).
"""

import numpy as np
import pytest
import torch

from metier.core import models, nash, part
from metier.core.batch import Lists, Tokens
from metier.core.data.collate import collate
from metier.core.data.encode import Item
from metier.core.lossmodule import LossModule
from metier.core.scores import reference_scorer
from metier.testing import check_part

RNG = np.random.default_rng(8)
LENGTHS = ((3, 2, 4), (1, 5), (2, 2, 1))
TOKENS = [[(-3 * RNG.random(n), -3 * RNG.random(n)) for n in row] for row in LENGTHS]
SCORES = [RNG.uniform(-0.5, 0.5, len(row)) for row in LENGTHS]


def build(**options):
    return part.build("objective", {"nash-md": options}).obj


def batch(rows=TOKENS, scores=SCORES, width=3):
    """Ragged lists with their tokens; the sums follow from the tokens, which are the leaves."""
    flat = [(i * width + k, *t) for i, row in enumerate(rows) for k, answer in enumerate(row) for t in zip(*answer, strict=True)]
    sequence, logps, ref = (torch.tensor([f[j] for f in flat]) for j in range(3))
    leaf = logps.clone().requires_grad_()
    size = len(rows) * width

    def summed(values):
        return values.new_zeros(size).index_add(0, sequence, values).view(len(rows), width)

    present = torch.tensor([[k < len(row) for k in range(width)] for row in rows])
    score = torch.tensor(np.stack([np.pad(s, (0, width - len(s)), constant_values=7.0) for s in scores]))
    tokens = Tokens(leaf, torch.ones_like(leaf), sequence, ref)
    return Lists(summed(leaf), summed(torch.ones_like(leaf)), score, present, summed(ref), tokens), leaf


def trl_loss(logps, ref, probability, beta):
    """See the module's docstring; one answer."""
    score = (probability - 0.5) * logps.sum()
    return beta * ((logps - ref).detach() * logps).sum() - score


def test_contract():
    check_part("objective/nash-md")


@pytest.mark.parametrize("tau", [0.0, 0.1, 2.0])
def test_formula_and_gradient(tau):
    """The slope in ``log π(y)`` is ``(τ log π/π_ref - s) / K``; the score of an absent answer does not count."""
    b, leaf = batch()
    loss, metrics = build(tau=tau)(b)
    (slope,) = torch.autograd.grad(loss.sum(), leaf)
    at = 0
    for i, (row, s) in enumerate(zip(TOKENS, SCORES, strict=True)):
        terms = []
        for (own, ref), value in zip(row, s, strict=True):
            ratio = own.sum() - ref.sum()
            terms.append(-value * own.sum() + tau * ratio * own.sum())
            np.testing.assert_allclose(slope[at : at + len(own)], (tau * ratio - value) / len(row), rtol=1e-9, atol=1e-12)
            at += len(own)
        assert loss[i].item() == pytest.approx(np.mean(terms), rel=1e-10)
        assert metrics["kl"][i].item() == pytest.approx(np.mean([o.sum() - r.sum() for o, r in row]))
        assert metrics["score"][i].item() == pytest.approx(s.mean())


@pytest.mark.parametrize("tau", [0.0, 0.1, 2.0])
def test_by_token_it_is_trls(tau):
    b, leaf = batch()
    loss, _ = build(tau=tau, per="token")(b)
    (slope,) = torch.autograd.grad(loss.sum(), leaf)
    expected, slopes = [], []
    for row, s in zip(TOKENS, SCORES, strict=True):
        values = []
        for (own, ref), value in zip(row, s, strict=True):
            x = torch.tensor(own, requires_grad=True)
            one = trl_loss(x, torch.tensor(ref), value + 0.5, tau)
            slopes.append(torch.autograd.grad(one, x)[0].numpy() / len(row))
            values.append(one.item())
        expected.append(np.mean(values))
    np.testing.assert_allclose(loss.detach(), expected, rtol=1e-10)
    np.testing.assert_allclose(slope, np.concatenate(slopes), rtol=1e-10)


def test_as_trl_computes_it():
    """Recorded from ``NashMDTrainer._compute_losses`` of trl 0.19.1, and the slopes of its sum: two answers, of 3 tokens each."""
    rows = [[([-1.0, -2.5, -0.5], [-1.5, -2.0, -0.75])], [([-3.0, -0.25, -1.5], [-2.0, -1.25, -1.0])]]
    b, leaf = batch([[tuple(map(np.array, pair)) for pair in row] for row in rows], [np.array([0.3]), np.array([-0.2])])
    loss, _ = build(tau=0.1, per="token")(b)
    (slope,) = torch.autograd.grad(loss.sum(), leaf)
    assert loss.sum().item() == pytest.approx(0.6625, rel=1e-12)
    np.testing.assert_allclose(slope, [-0.25, -0.35, -0.275, 0.1, 0.3, 0.15], rtol=1e-12)


def test_answers_of_one_token_have_one_form():
    rows = [[(o[:1], r[:1]) for o, r in row] for row in TOKENS]
    for a, b in zip(*(build(tau=0.7, per=p)(batch(rows)[0]) for p in ("sequence", "token")), strict=True):
        for x, y in zip(a.values(), b.values(), strict=True) if isinstance(a, dict) else [(a, b)]:
            torch.testing.assert_close(x, y)


def test_at_the_reference_only_scores_count():
    rows = [[(o, o) for o, _ in row] for row in TOKENS]
    for per in ("sequence", "token"):
        slopes = []
        for tau in (0.0, 3.0):
            b, leaf = batch(rows)
            slopes += torch.autograd.grad(build(tau=tau, per=per)(b)[0].sum(), leaf)
        torch.testing.assert_close(*slopes)


def test_needs_tokens_only_by_token():
    assert build().needs == {"reference"}
    assert build(per="token").needs == {"reference", "tokens"}


def test_expected_gradient_is_that_of_the_regularised_game():
    """Over all answers of a table, weighted by π: the slope of ``-(P(π > π') - τ KL(π‖μ))`` in π's logits, and none at the
    equilibrium against itself."""
    rng = np.random.default_rng(1)
    p = np.triu(rng.random((4, 4)), 1)
    p = p + np.tril(1 - p.T, -1) + 0.5 * np.eye(4)
    mu, tau, opponent = rng.dirichlet(np.ones(4)), 0.3, rng.dirichlet(np.ones(4))

    def slope_of_loss(logits, against):
        x = torch.tensor(logits, requires_grad=True)
        logp = x.log_softmax(0)
        one = torch.ones(4, 1, dtype=torch.float64)
        b = Lists(logp[:, None], one, torch.tensor(p @ against - 0.5)[:, None], one.bool(), torch.tensor(np.log(mu))[:, None])
        loss = build(tau=tau)(b)[0]
        return torch.autograd.grad((loss * logp.exp().detach()).sum(), x)[0].numpy()

    logits = rng.normal(size=4)
    x = torch.tensor(logits, requires_grad=True)
    pi = x.softmax(0)
    game = pi @ torch.tensor(p @ opponent) - tau * (pi * (pi.log() - torch.tensor(np.log(mu)))).sum()
    (exact,) = torch.autograd.grad(-game, x)
    np.testing.assert_allclose(slope_of_loss(logits, opponent), exact.numpy(), atol=1e-12)
    star = nash.regularised(p, mu, tau)
    np.testing.assert_allclose(slope_of_loss(np.log(star), star), 0, atol=1e-9)


@pytest.mark.parametrize("per", ["sequence", "token"])
def test_on_models(per):
    """From token ids to the loss: each answer alone through the model, ragged lists of two and three."""
    policy, frozen = (models.load("lab/llama-50k", seed=s).model.double() for s in (1, 2))
    made = [([5, 6], [[7, 8, 9], [10]], (0.3, -0.2)), ([11, 12, 13], [[14], [15, 16], [17, 18]], (0.1, -0.4, 0.25))]
    items = [
        Item(np.array(p), np.zeros(len(p), bool), tuple(map(np.array, a)), tuple(np.ones(len(x), bool) for x in a), "x", label=s)
        for p, a, s in made
    ]
    module = LossModule(
        policy, part.build("objective", {"nash-md": {"tau": 0.4, "per": per}}), reference_scorer(frozen, torch.no_grad)
    )
    total, units, _ = module(collate(items, pad_id=3))

    def logp(model, prompt, answer):
        z = model(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1).detach().numpy()
        return np.array([z[len(prompt) - 1 + i, t] for i, t in enumerate(answer)])

    expected = 0.0
    for p, answers, scores in made:
        for a, s in zip(answers, scores, strict=True):
            own, ref = logp(policy, p, a), logp(frozen, p, a)
            kl = (own - ref).sum() * own.sum() if per == "sequence" else ((own - ref) * own).sum()
            expected += (0.4 * kl - s * own.sum()) / len(answers)
    assert units == 2
    np.testing.assert_allclose(float(total.detach()), expected, rtol=1e-5)
