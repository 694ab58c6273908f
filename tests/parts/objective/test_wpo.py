"""Oracle of objective/wpo: weights from whole distributions in float64 numpy, trl's, and any loss inside.

Bugs it is meant to catch: gradient through the weight, sums for means, one side's weight, no clamp, a forgotten need.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from _pairwise import build, loss_of, one_by_one, pairs, slopes, summed, trl_dpo, values

from metier.core.errors import UsageError
from metier.testing import check_part


def test_contract():
    check_part("objective/wpo")


def from_logits(seed=0, count=5, vocabulary=6, spread=1.5):
    """Pairs whose tokens come from distributions; weights ``ω_w ω_l`` of them in NumPy."""
    rng = np.random.default_rng(seed)
    b = pairs(seed, count)
    n = len(b.tokens.logps)
    z = spread * rng.normal(size=(n, vocabulary))
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    chosen = np.array([rng.choice(vocabulary, p=row) for row in p])
    logps = torch.tensor(np.log(p[np.arange(n), chosen]))
    squares = torch.tensor(np.log((p**2).sum(1)))
    w, r = summed(logps, b.tokens.sequence, count)
    tokens = replace(b.tokens, logps=logps, collision=squares)
    made = replace(b, tokens=tokens, chosen_logps=w, rejected_logps=r)
    sequence = b.tokens.sequence.numpy()
    omega = [
        np.exp(np.mean([np.log(p[t, chosen[t]] / (p[t] ** 2).sum()) for t in np.flatnonzero(sequence == s)]))
        for s in range(2 * count)
    ]
    return made, np.array(omega[0::2]) * np.array(omega[1::2])


@pytest.mark.parametrize("clamp", [True, False])
def test_weights(clamp):
    b, weight = from_logits()
    assert weight.max() > 1
    assert weight.min() < 0.9
    expected = np.minimum(1, weight) if clamp else weight
    loss, metrics = build("wpo", clamp=clamp)(b)
    np.testing.assert_allclose(metrics["weight"], expected, rtol=1e-12)
    np.testing.assert_allclose(loss, expected * values(build("dpo"), b), rtol=1e-12)
    assert "margin" in metrics


def test_no_gradient_through_the_weight():
    b, weight = from_logits()
    inner, outer = slopes(build("dpo"), b), slopes(build("wpo", clamp=False), b)
    np.testing.assert_allclose(outer, np.array(inner) * weight, rtol=1e-12)
    leaf = b.tokens.logps.clone().requires_grad_()
    b.chosen_logps.requires_grad_()
    loss_of(build("wpo"), replace(b, tokens=replace(b.tokens, logps=leaf))).sum().backward()
    assert leaf.grad is None


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
def test_as_trl(loss_type):
    """trl's ``use_weighting`` has no clamp; wzhouad/WPO clamps the product at 1."""
    pytest.importorskip("trl")
    b, weight = from_logits(count=8)
    inner = {"dpo": {"beta": 0.2}} if loss_type == "sigmoid" else {"ipo": {"tau": 0.2}}
    theirs = np.array([trl_dpo(p, loss_type, beta=0.2, use_weighting=True).item() for p in one_by_one(b)])
    np.testing.assert_allclose(values(build("wpo", of=inner, clamp=False), b), theirs, rtol=1e-9)
    np.testing.assert_allclose(values(build("wpo", of=inner), b), theirs / np.maximum(1, weight), rtol=1e-9)


def test_a_policy_that_chooses_evenly_has_weight_1():
    b = pairs()
    even = torch.full_like(b.tokens.logps, -np.log(50))
    b = replace(b, tokens=replace(b.tokens, logps=even, collision=even))
    np.testing.assert_allclose(values(build("wpo", of="simpo"), b), values(build("simpo"), b), rtol=1e-12)


def test_needs_follow_the_loss_inside():
    assert build("wpo").needs == {"reference", "tokens", "collision"}
    assert build("wpo", of="simpo").needs == {"tokens", "collision"}
    assert build("wpo", of={"typo": {"lam": 1.0}}).needs == {"samples", "tokens", "collision"}


@pytest.mark.parametrize("of", ["aot", "dr-dpo", "alpha-dpo"])
def test_losses_of_a_whole_step_are_refused(of):
    with pytest.raises(UsageError, match=of):
        build("wpo", of=of)


def test_other_data_and_unknown_names_are_refused():
    with pytest.raises(UsageError, match="Tokens"):
        build("wpo", of="lm")
    with pytest.raises(UsageError, match="simpo"):
        build("wpo", of="simpoo")
