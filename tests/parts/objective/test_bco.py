"""Oracle of objective/bco: the classifier's logistic loss in float64 numpy over several steps, and trl's formulas worked out by hand.

Bugs it is meant to catch: gradient through the shift, the shift taken before the step it belongs to, steps weighted equally
instead of answers, state lost on resumption, evaluation that moves the shift, a call that changes the state.
"""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from metier.core import part
from metier.core.batch import Rated
from metier.testing import check_part


def bco(**options):
    return part.build("objective", {"bco": options}).obj


def rated(logps, ref, label):
    t = [torch.tensor(v, dtype=torch.float64) for v in (logps, ref)]
    return Rated(t[0], torch.full_like(t[0], 4.0), torch.tensor(label), t[1])


def steps(sizes=((3, 4), (1, 6), (5, 2)), seed=3):
    rng = np.random.default_rng(seed)
    for good, bad in sizes:
        label = rng.permutation([True] * good + [False] * bad)
        yield rated(-20 * rng.random(good + bad), -20 * rng.random(good + bad), label)


def ratios(b):
    return (b.logps - b.ref_logps).numpy(), b.label.numpy()


def test_contract():
    check_part("objective/bco")


@pytest.mark.parametrize("shift", ["balanced", "pooled"])
def test_running_shift_and_loss(shift):
    beta, objective = 0.3, bco(beta=0.3, shift=shift)
    seen, labels = np.zeros(0), np.zeros(0, bool)
    for b in steps():
        objective.observe(b)
        ratio, label = ratios(b)
        seen, labels = np.append(seen, beta * ratio), np.append(labels, label)
        delta = seen.mean() if shift == "pooled" else (seen[labels].mean() + seen[~labels].mean()) / 2
        loss, metrics = objective(b)
        wanted = np.log1p(np.exp(np.where(label, -1, 1) * (beta * ratio - delta)))
        np.testing.assert_allclose(loss.numpy(), wanted, rtol=1e-10)
        assert metrics["shift"].item() == pytest.approx(delta, rel=1e-12)
        np.testing.assert_array_equal(metrics["accuracy"].numpy(), (beta * ratio > delta) == label)


def test_shifts_agree_on_balanced_labels_only():
    for sizes, same in ((((4, 4), (2, 2)), True), (((4, 4), (1, 5)), False)):
        a, b = bco(), bco(shift="pooled")
        for step in steps(sizes):
            a.observe(step)
            b.observe(step)
        assert (abs(a.delta - b.delta) < 1e-12) is same


def test_call_is_pure_and_needs_no_observation():
    objective, (b, *_) = bco(beta=0.5), list(steps())
    before, again = objective(b)[0], objective(b)[0]
    assert torch.equal(before, again)
    assert objective.delta == 0
    ratio, label = ratios(b)
    np.testing.assert_allclose(before.numpy(), np.log1p(np.exp(np.where(label, -0.5, 0.5) * ratio)), rtol=1e-10)


def test_no_shift_is_half_of_the_pair_loss():
    """Two rows of a pair with shift 0: ``-log σ(R_w) - log σ(-R_l)``, in all 2 log 2 at the start."""
    pair = rated([-3.0, -9.0], [-4.0, -7.0], [True, False])
    assert bco(beta=0.5)(pair)[0].sum().item() == pytest.approx(np.log1p(np.exp(-0.5)) + np.log1p(np.exp(-1.0)), rel=1e-12)
    start = rated([-3.0, -9.0], [-3.0, -9.0], [True, False])
    assert bco()(start)[0].sum().item() == pytest.approx(2 * np.log(2), rel=1e-12)


@pytest.mark.parametrize("shift", ["balanced", "pooled"])
def test_gradient_knows_no_shift(shift):
    objective, (b, *_) = bco(beta=0.4, shift=shift), list(steps())
    leaf = b.logps.requires_grad_()
    objective.observe(b)
    loss, _ = objective(b)
    (slope,) = torch.autograd.grad(loss.sum(), leaf)
    s = 1 / (1 + np.exp(-(0.4 * (b.logps - b.ref_logps).detach().numpy() - objective.delta)))
    np.testing.assert_allclose(slope.numpy(), 0.4 * np.where(b.label.numpy(), s - 1, s), rtol=1e-9)


def test_one_label_so_far():
    objective = bco(beta=1.0)
    b = rated([-1.0, -2.0], [-2.0, -5.0], [True, True])
    objective.observe(b)
    assert objective.delta == pytest.approx(2.0)
    other = rated([-6.0], [-1.0], [False])
    objective.observe(other)
    assert objective.delta == pytest.approx((2.0 - 5.0) / 2)


@pytest.mark.parametrize("shift", ["balanced", "pooled"])
def test_resumed(shift):
    objective, resumed = bco(shift=shift), bco(shift=shift)
    first, second, third = steps()
    objective.observe(first)
    objective.observe(second)
    resumed.load_state_dict(json.loads(json.dumps(objective.state_dict())))
    for o in (objective, resumed):
        o.observe(third)
    assert objective.delta == resumed.delta
    assert torch.equal(objective(third)[0], resumed(third)[0])


def test_order_of_rows_is_nothing():
    objective, (b, *_) = bco(), list(steps())
    objective.observe(b)
    order = torch.randperm(len(b.logps), generator=torch.Generator().manual_seed(0))
    moved = Rated(*(getattr(b, k)[order] for k in ("logps", "length", "label", "ref_logps")))
    torch.testing.assert_close(objective(b)[0][order], objective(moved)[0], rtol=0, atol=0)
    again = bco()
    again.observe(moved)
    assert again.delta == pytest.approx(objective.delta, rel=1e-14)


def test_half_precision_scores_leave_no_drift():
    """Means are kept in double precision whatever the scores' type."""
    objective, (b, *_) = bco(beta=1.0, shift="pooled"), list(steps())
    small = replace(b, logps=b.logps.float(), ref_logps=b.ref_logps.float())
    for _ in range(2000):
        objective.observe(small)
    assert objective.delta == pytest.approx(float((small.logps - small.ref_logps).double().mean()), rel=1e-9)


def test_as_trl_computes_it():
    """Recorded from ``BCOTrainer.bco_loss`` of trl 0.19.1, run on these numbers over two training steps, without density weights;
    the installed version has no such trainer."""
    objective = bco(beta=0.1, shift="pooled")
    objective.observe(rated([-10.0, -14.0, -9.0], [-12.0, -13.0, -11.0], [True, False, True]))
    second = rated([-8.0, -20.0, -7.5, -6.0], [-11.0, -15.0, -9.5, -6.5], [True, False, False, True])
    objective.observe(second)
    loss, metrics = objective(second)
    # rewards .2 -.1 .2 | .3 -.5 .2 .05: mean .05, which trl keeps in single precision
    assert metrics["shift"].item() == pytest.approx(0.05, rel=1e-12)
    np.testing.assert_allclose(loss.numpy(), [0.5759394202, 0.4554924811, 0.7709570473, 0.6931471809], atol=6e-9)
