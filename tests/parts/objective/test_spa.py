"""Oracle of objective/spa: extrapolated margins from logits in float64 numpy, the window's quantile, limits to DPO.

Bugs it is meant to catch: the model extrapolated towards the reference, logits mixed after the softmax, a gradient through
the judge, a quantile over all history, alpha before the warmup is over, softer labels for the confident pairs.
"""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from _pairwise import at_reference, build, letters, of, one_by_one, pairs, picked, sig, slopes, softplus, values

from metier import train
from metier.core.batch import Pairs, Tokens
from metier.lab import wordpairs
from metier.testing import check_part


def test_contract():
    check_part("objective/spa")


def with_logits(seed=0, count=6, vocabulary=9, same=False):
    """Pairs whose tokens, sums and logits belong together; ``same``: the model equals its reference."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 8, 2 * count)
    number = int(lengths.sum())
    z, ref = (torch.tensor(2 * rng.normal(size=(number, vocabulary))) for _ in range(2))
    z = ref.clone() if same else z
    targets = torch.tensor(rng.integers(0, vocabulary, number))
    sequence = torch.tensor(np.repeat(np.arange(2 * count), lengths))
    logp, ref_logp = (x.log_softmax(1).gather(1, targets[:, None])[:, 0] for x in (z, ref))
    sums, ref_sums = (torch.zeros(2 * count, dtype=torch.float64).index_add(0, sequence, x) for x in (logp, ref_logp))
    n = torch.tensor(lengths).double()
    tokens = Tokens(logp, torch.ones(number, dtype=torch.float64), sequence, ref_logp, z, targets, ref)
    return Pairs(sums[0::2], sums[1::2], n[0::2], n[1::2], ref_sums[0::2], ref_sums[1::2], tokens=tokens)


def margins(b, lam, beta=0.1):
    """c in plain numpy, token by token."""
    t, out = b.tokens, []
    totals = np.zeros(2 * len(b.chosen_logps))
    for i, s in enumerate(t.sequence.tolist()):
        z = (1 + lam) * t.logits[i].numpy() - lam * t.ref_logits[i].numpy()
        totals[s] += z[int(t.targets[i])] - np.log(np.sum(np.exp(z)))
    for i in range(len(b.chosen_logps)):
        ref = float(b.ref_chosen_logps[i] - b.ref_rejected_logps[i])
        out.append(beta * (totals[2 * i] - totals[2 * i + 1] - ref))
    return np.array(out)


@pytest.mark.parametrize("lam", [0.3, 1.0, 2.5])
def test_the_extrapolated_margin(lam):
    b = with_logits()
    objective = build("spa", lam=lam, beta=0.3)
    np.testing.assert_allclose(objective.confidence(b), margins(b, lam, 0.3), rtol=1e-10)
    np.testing.assert_allclose(objective.confidence(objective.condense(b)), margins(b, lam, 0.3), rtol=1e-10)
    assert objective.condense(b).tokens is None


def test_without_extrapolation_it_is_the_own_margin():
    b = with_logits()
    np.testing.assert_allclose(build("spa").confidence(b), 0.1 * letters(b).h, rtol=1e-12)
    np.testing.assert_allclose(margins(b, 0.0), 0.1 * letters(b).h, rtol=1e-9)
    np.testing.assert_allclose(build("spa", lam=1e-9).confidence(b), 0.1 * letters(b).h, rtol=1e-6)
    assert build("spa").condense(b) is b
    np.testing.assert_allclose(build("spa", lam=2.0).confidence(with_logits(same=True)), 0.0, atol=1e-12)


def test_extrapolation_goes_away_from_the_reference():
    """One token, two words: the judge of λ is surer of what the model has learnt."""
    z, ref = torch.tensor([[1.0, 0.0]] * 2).double(), torch.zeros(2, 2, dtype=torch.float64)
    targets, sequence = torch.tensor([0, 1]), torch.tensor([0, 1])
    logp = z.log_softmax(1)[[0, 1], targets]
    ref_logp = torch.full((2,), -np.log(2), dtype=torch.float64)
    one = torch.ones(1, dtype=torch.float64)
    tokens = Tokens(logp, torch.ones(2), sequence, ref_logp, z, targets, ref)
    b = Pairs(logp[:1], logp[1:], one, one, ref_logp[:1], ref_logp[1:], tokens=tokens)
    found = [float(build("spa", lam=lam, beta=1.0).confidence(b)) for lam in (0.0, 0.5, 1.0)]
    np.testing.assert_allclose(found, [1.0, 1.5, 2.0], rtol=1e-12)


def test_needs():
    assert build("spa").needs == {"reference", "batch"}
    assert build("spa", lam=0.1).needs == {"reference", "batch", "tokens", "logits"}


@pytest.mark.parametrize("lam", [0.0, 0.7])
def test_swapping_the_label_flips_the_sign(lam):
    b = with_logits()
    t = b.tokens
    order = torch.argsort(t.sequence ^ 1, stable=True)
    moved = {k: v[order] for k, v in vars(t).items() if isinstance(v, torch.Tensor)} | {"sequence": (t.sequence ^ 1)[order]}
    other = Pairs(
        b.rejected_logps, b.chosen_logps, b.rejected_len, b.chosen_len, b.ref_rejected_logps, b.ref_chosen_logps,
        tokens=replace(t, **moved),
    )  # fmt: skip
    objective = build("spa", lam=lam)
    np.testing.assert_allclose(objective.confidence(other), -objective.confidence(b), rtol=1e-10)


@pytest.mark.parametrize("options", [{"alpha": 0.0}, {"q": 0.0}, {"alpha": 0.0, "lam": 0.5}, {"warmup": 1.0}], ids=str)
def test_plain_dpo(options):
    b = with_logits(count=20)
    objective, dpo = build("spa", **options), build("dpo")
    objective.observe(b)
    objective.progress = 0.5 if "warmup" in options else 1.0
    np.testing.assert_allclose(values(objective, b), values(dpo, b), rtol=1e-12)
    for own, plain in zip(slopes(objective, b), slopes(dpo, b), strict=True):
        np.testing.assert_allclose(own, plain, rtol=1e-12)


def flat(h, beta=1.0):
    """One-token pairs with the given margins."""
    return of(list(h), [0.0] * len(h), rw=[0.0] * len(h), rl=[0.0] * len(h))


@pytest.mark.parametrize(("q", "size"), [(0.1, 64), (0.1, 10), (0.1, 9), (0.25, 30), (0.3, 10), (0.9, 21), (1.0, 8), (0.0, 8)])
def test_exactly_that_many_of_a_window_are_doubted(q, size):
    h = np.random.default_rng(3).normal(size=size)
    objective = build("spa", q=q, window=size, beta=1.0)
    objective.observe(flat(h))
    doubted = objective(flat(h))[1]["doubted"].numpy()
    count = int(np.floor(q * size + 1e-9))
    assert doubted.sum() == count
    assert set(np.flatnonzero(doubted)) == set(np.argsort(h)[:count])


def test_ties_are_not_doubted():
    objective = build("spa", q=0.5)
    objective.observe(at_reference(pairs(count=8)))
    assert objective(at_reference(pairs(count=8)))[1]["doubted"].sum() == 0
    np.testing.assert_allclose(values(objective, at_reference(pairs())), np.log(2), rtol=1e-12)


def test_the_window_slides():
    """Old low margins leave the window: a quantile over all history would sink and doubt nothing of today's."""
    objective = build("spa", q=0.25, window=8, beta=1.0)
    objective.observe(flat(range(-108, -100)))
    objective.observe(flat([1.0, 2.0, 3.0, 4.0]))
    assert objective.margins == [-104.0, -103.0, -102.0, -101.0, 1.0, 2.0, 3.0, 4.0]
    objective.observe(flat([5.0, 6.0, 7.0, 8.0]))
    assert objective.margins == [float(i) for i in range(1, 9)]
    np.testing.assert_array_equal(objective(flat([2.5, 3.0, 1.0]))[1]["doubted"], [1.0, 0.0, 1.0])
    objective.observe(flat(range(20)))
    assert len(objective.margins) == 8


@pytest.mark.parametrize("alpha", [0.1, 0.4])
def test_loss_and_gradients_of_soft_labels(alpha):
    b = pairs(count=12)
    objective, x = build("spa", alpha=alpha, q=0.5, beta=0.4), letters(b)
    objective.observe(b)
    z = 0.4 * x.h
    low = x.h < np.sort(x.h)[6]
    w = np.where(low, 1 - alpha, 1.0)
    np.testing.assert_allclose(values(objective, b), w * softplus(-z) + (1 - w) * softplus(z), rtol=1e-10)
    g_w, g_l = slopes(objective, b)
    np.testing.assert_allclose(g_w, -0.4 * (w * sig(-z) - (1 - w) * sig(z)), rtol=1e-10)
    np.testing.assert_allclose(g_l, -g_w, rtol=1e-12)


def test_no_gradient_through_the_judge():
    b = with_logits(count=10)
    z = b.tokens.logits.clone().requires_grad_()
    b = replace(b, tokens=replace(b.tokens, logits=z))
    objective = build("spa", lam=0.5, q=0.5)
    objective.observe(b)
    loss, metrics = objective(b)
    assert not metrics["confidence"].requires_grad
    assert not loss.requires_grad, "only the logits carry gradient here, and they reach the judge alone"


def test_alpha_waits_for_the_warmup():
    objective, b = build("spa", q=1.0, alpha=0.3, warmup=0.2), pairs()
    objective.observe(b)
    found = []
    for progress in (0.0, 0.19, 0.2, 1.0):
        objective.progress = progress
        found.append(bool(np.allclose(values(objective, b), values(build("dpo"), b))))
    assert found == [True, True, False, False]


def test_order_padding_and_state():
    objective, b = build("spa", q=0.5, beta=0.5), pairs(count=8)
    objective.observe(b)
    whole = values(objective, b)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(values(objective, picked(b, order)), whole[order], rtol=1e-12)
    np.testing.assert_allclose(np.concatenate([values(objective, p) for p in one_by_one(b)]), whole, rtol=1e-12)
    other = build("spa", q=0.5, beta=0.5)
    other.load_state_dict(json.loads(json.dumps(objective.state_dict())))
    np.testing.assert_array_equal(values(other, pairs(7)), values(objective, pairs(7)))
    before = json.dumps(objective.state_dict())
    objective(pairs(5))
    assert json.dumps(objective.state_dict()) == before


@pytest.mark.parametrize("lam", [0.0, 0.5])
def test_training_does_not_depend_on_micro_batches(tmp_path, lam):
    """Whole steps, split steps and an interrupted run reach the same losses, with the logits kept to their micro-batch."""
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(r) + "\n" for r in wordpairs.pairs(24, 2)), encoding="utf-8")
    run = {
        "model": "lab/words-sft", "data": {"train": str(data), "max_length": 64}, "schedule": "constant",
        "objective": {"spa": {"lam": lam, "window": 20, "q": 0.3, "alpha": 0.4, "beta": 0.5}},
        "optimizer": {"adamw": {"lr": 1e-3}}, "train": {"steps": 6, "batch": 8},
    }  # fmt: skip
    whole = train(run, out=tmp_path / "whole", quiet=True)
    split = train({**run, "train": {**run["train"], "micro_batch": 3}}, out=tmp_path / "split", quiet=True)
    train({**run, "train": {**run["train"], "steps": 6, "max_seconds": 1e-9}}, out=tmp_path / "parts", quiet=True)
    rest = train(run, out=tmp_path / "parts", quiet=True)
    curves = [[(e["loss"], e["doubted"]) for e in r.events if e["event"] == "step"] for r in (whole, split, rest)]
    assert curves[0][0][0] == pytest.approx(
        curves[1][0][0], abs=2e-5
    )  # at first all margins tie, and rounding says who is doubted
    np.testing.assert_allclose(curves[0][1:], curves[1][1:], atol=2e-5)
    np.testing.assert_allclose(curves[0][-1], curves[2][-1], atol=1e-6)
    assert any(0 < d < 1 for _, d in curves[0])
