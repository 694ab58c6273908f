"""Oracle of objective/nash-md: the formula in numpy, trl's trainer line by line, exact gradients of the game on a table.

Bugs it is meant to catch: the log-ratio with a gradient, the sign of the KL term, sums for means over ragged lists, scores of absent
answers, tokens of one answer credited to another, a gradient that moves mass to answers that are never drawn.

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


def factors(row, scores, tau):
    """``c`` of each answer of a list."""
    own = [tau * (o.sum() - r.sum()) - s for (o, r), s in zip(row, scores, strict=True)]
    return [c - np.mean([d for j, d in enumerate(own) if j != k]) for k, c in enumerate(own)]


@pytest.mark.parametrize("tau", [0.0, 0.1, 2.0])
def test_formula_and_gradient(tau):
    """The slope in ``log π(y)`` is ``c / K``; the score of an absent answer does not count."""
    b, leaf = batch()
    loss, metrics = build(tau=tau)(b)
    (slope,) = torch.autograd.grad(loss.sum(), leaf)
    at = 0
    for i, (row, s) in enumerate(zip(TOKENS, SCORES, strict=True)):
        c = factors(row, s, tau)
        for (own, _), value in zip(row, c, strict=True):
            np.testing.assert_allclose(slope[at : at + len(own)], value / len(row), rtol=1e-9, atol=1e-12)
            at += len(own)
        assert loss[i].item() == pytest.approx(np.mean([v * o.sum() for v, (o, _) in zip(c, row, strict=True)]), rel=1e-10)
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


def test_lists_of_one_answer_have_the_paper_s_baseline_and_one_form_on_one_token():
    rows = [[(row[0][0][:1], row[0][1][:1])] for row in TOKENS]
    scores = [s[:1] for s in SCORES]
    slopes = []
    for per in ("sequence", "token"):
        b, leaf = batch(rows, scores)
        slopes += torch.autograd.grad(build(tau=0.7, per=per)(b)[0].sum(), leaf)
    torch.testing.assert_close(*slopes)
    expected = [0.7 * (o[0] - r[0]) - s[0] for ((o, r),), s in zip(rows, scores, strict=True)]
    np.testing.assert_allclose(slopes[0], expected, rtol=1e-10)


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


def game(size, seed=1):
    rng = np.random.default_rng(seed)
    p = np.triu(rng.random((size, size)), 1)
    return p + np.tril(1 - p.T, -1) + 0.5 * np.eye(size), rng


def expected_slope(logits, mu, scores, tau, kept, size=2):
    """Mean slope in the logits of a table's policy over all lists of ``size`` answers, drawn from it among ``kept``."""
    x = torch.tensor(logits, requires_grad=True)
    logp = x.log_softmax(0)
    lists = torch.cartesian_prod(*[torch.tensor(kept)] * size)
    shape, ref = lists.shape, torch.tensor(np.log(mu))
    b = Lists(
        logp[lists], torch.ones(shape).double(), torch.tensor(scores)[lists], torch.ones(shape, dtype=torch.bool), ref[lists]
    )
    weight = torch.tensor(logits)[kept].softmax(0).new_zeros(len(logits)).index_copy(
        0, torch.tensor(kept), torch.tensor(logits)[kept].softmax(0)
    )[lists].prod(1)  # fmt: skip
    return torch.autograd.grad((build(tau=tau)(b)[0] * weight).sum(), x)[0].numpy()


def exact_slope(logits, mu, scores, tau, kept):
    """Of ``-(P(π > π') - τ KL(π‖μ))`` with both renormalised among ``kept``."""
    x = torch.tensor(logits, requires_grad=True)
    log, ref = x[kept].log_softmax(0), torch.tensor(np.log(mu[kept] / mu[kept].sum()))
    value = (log.exp() * (torch.tensor(scores[kept]) - tau * (log - ref))).sum()
    return torch.autograd.grad(-value, x)[0].numpy()


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("kept", [[0, 1, 2, 3], [1, 2, 3]])
def test_expected_gradient_is_that_of_the_regularised_game(kept, size):
    """Among all answers of a table, and when answer 0, the empty one, is never drawn: it then has no slope at all."""
    p, rng = game(4)
    mu, opponent, logits, tau = rng.dirichlet(np.ones(4)), rng.dirichlet(np.ones(4)), rng.normal(size=4), 0.3
    found = expected_slope(logits, mu, p @ opponent - 0.5, tau, kept, size)
    np.testing.assert_allclose(found, exact_slope(logits, mu, p @ opponent - 0.5, tau, kept), atol=1e-12)
    assert (abs(found[0]) < 1e-12) == (0 not in kept)


def test_no_slope_at_the_equilibrium_against_itself():
    p, rng = game(4)
    mu, tau = rng.dirichlet(np.ones(4)), 0.3
    star = nash.regularised(p, mu, tau)
    np.testing.assert_allclose(expected_slope(np.log(star), mu, p @ star - 0.5, tau, [0, 1, 2, 3]), 0, atol=1e-9)


def test_no_mass_moves_to_answers_that_are_not_in_the_list():
    """Not on the average only: each list leaves the end token's logit at the first place where it is, whatever its answers."""
    rng = np.random.default_rng(5)
    x = torch.tensor(rng.normal(size=5), requires_grad=True)
    lists = torch.tensor([[1, 2, 2], [4, 3, 1]])
    b = Lists(
        x.log_softmax(0)[lists], torch.ones(2, 3).double(), torch.tensor(rng.normal(size=(2, 3))),
        torch.ones(2, 3, dtype=torch.bool), torch.tensor(np.log(rng.dirichlet(np.ones(5))))[lists],
    )  # fmt: skip
    for i in range(2):
        (slope,) = torch.autograd.grad(build(tau=0.5)(b)[0][i], x, retain_graph=True)
        assert abs(float(slope[0])) < 1e-14
        assert float(slope.abs().max()) > 1e-3


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
        rows = [(logp(policy, p, a), logp(frozen, p, a)) for a in answers]
        c = factors(rows, scores, 0.4)
        for (own, ref), s, f in zip(rows, scores, c, strict=True):
            by_token = 0.4 * ((own - ref) * own).sum() - s * own.sum()
            expected += (f * own.sum() if per == "sequence" else by_token) / len(answers)
    assert units == 2
    np.testing.assert_allclose(float(total.detach()), expected, rtol=1e-5)
