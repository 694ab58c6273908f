"""Oracle of optimizer/sophia: algorithm 3 of the paper in NumPy, and numbers of the authors' release."""

import numpy as np
import pytest
import torch

from metier.core import part
from metier.core.optim import Optimizer, Step

LABELS = 32


def follow(course, sampled, *, lr=0.03, weight_decay=0.1, samples=LABELS, **options):
    """Positions on the course's gradients when the sampler gives ``sampled[t]`` at step t (from 0)."""
    p = torch.nn.Parameter(torch.tensor(course.start))
    optimizer = Optimizer([p], part.build("optimizer", {"sophia": options}).obj, lr=lr, weight_decay=weight_decay)
    seen, calls = [], []
    for t, g in enumerate(course.grads):
        optimizer.sampler = lambda t=t: (calls.append(t + 1), (samples, {id(p): torch.tensor(sampled[t])}))[1]
        p.grad = torch.tensor(g)
        optimizer.step()
        seen.append(p.detach().numpy().copy())
    return np.stack(seen), calls


def formula(course, sampled, *, lr=0.03, wd=0.1, b1=0.965, b2=0.99, gamma=0.05, eps=1e-12, every=10, samples=LABELS):
    p, m, h, out = course.start.copy(), 0.0, np.zeros_like(course.start), []
    for t, g in enumerate(course.grads, start=1):
        m = b1 * m + (1 - b1) * g
        if every == 1 or t % every == 1:
            h = b2 * h + (1 - b2) * samples * sampled[t - 1] * sampled[t - 1]
        p = p - lr * wd * p
        p = p - lr * np.clip(m / np.maximum(gamma * h, eps), -1, 1)
        out.append(p)
    return np.stack(out)


def draws(course, scale=0.3, seed=7):
    rng = np.random.default_rng(seed)
    return [np.asarray(rng.normal(size=course.start.shape) * scale) for _ in course.grads]


@pytest.mark.parametrize(
    "options",
    [{}, {"every": 1}, {"every": 3, "gamma": 2.0}, {"every": 4, "beta1": 0.5, "beta2": 0.0, "gamma": 3.0, "eps": 0.2}],
)
def test_formula(course, options):
    sampled = draws(course)
    got, calls = follow(course, sampled, **options)
    names = {"beta1": "b1", "beta2": "b2"}
    wanted = formula(course, sampled, **{names.get(k, k): v for k, v in options.items()})
    np.testing.assert_allclose(got, wanted, rtol=1e-10)
    every = options.get("every", 10)
    assert calls == [t for t in range(1, len(course.grads) + 1) if (t - 1) % every == 0]


def test_both_clipped_and_free_entries_are_seen(matrix):
    moved = np.diff(follow(matrix, draws(matrix), lr=1.0, weight_decay=0.0, every=3, gamma=2.0)[0], axis=0)
    clipped = np.isclose(np.abs(moved), 1.0)
    assert 0.1 < clipped.mean() < 0.9
    assert np.abs(moved).max() <= 1 + 1e-12


def test_without_curvature_it_is_the_sign_of_the_momentum(matrix):
    matrix.grads = [np.where(g == 0, 0.1, g) for g in matrix.grads]
    got, _ = follow(matrix, [np.zeros((4, 6))] * 10, beta1=0.9)
    np.testing.assert_allclose(got, matrix.run("signum", beta=0.9), rtol=1e-12)


def test_with_a_huge_gamma_it_is_momentum_over_curvature(matrix):
    sampled = [0.3 + np.abs(g) for g in draws(matrix)]
    got, _ = follow(matrix, sampled, lr=1e6, weight_decay=0.0, gamma=1e6, every=100)
    m, p = 0.0, matrix.start.copy()
    for g in matrix.grads:
        m = 0.965 * m + 0.035 * g
        p = p - m / (0.01 * LABELS * sampled[0] ** 2)
    np.testing.assert_allclose(got[-1], p, rtol=1e-8)


def test_a_tensor_that_the_sampled_loss_does_not_reach_keeps_its_curvature():
    rule = part.build("optimizer", "sophia").obj
    for run in (rule.plain, rule.together):
        params, grads = [torch.zeros(3), torch.zeros(2)], [torch.ones(3), torch.ones(2)]
        states = [rule.init(p) for p in params]
        run(params, grads, states, Step(t=1, lr=0.1, sampled=(None, torch.ones(2)), samples=4))
        assert torch.equal(states[0]["h"], torch.zeros(3))
        torch.testing.assert_close(states[1]["h"], torch.full((2,), 0.04))
        torch.testing.assert_close(params[0], torch.full((3,), -0.1))


def test_all_at_once_is_one_by_one():
    rule = part.build("optimizer", {"sophia": {"every": 2, "gamma": 2.0}}).obj
    source = torch.Generator().manual_seed(3)
    shapes = [(), (5,), (4, 6), (2, 3, 4)]
    fast = [torch.randn(s, generator=source, dtype=torch.float64) for s in shapes]
    plain, states = [p.clone() for p in fast], [rule.init(p) for p in fast]
    others = [rule.init(p) for p in fast]
    for t in range(1, 6):
        grads = [torch.randn(s, generator=source, dtype=torch.float64) for s in shapes]
        step = Step(t=t, lr=0.1, weight_decay=0.1, sampled=tuple(g.sin() for g in grads) if t % 2 else None, samples=8)
        rule.together(fast, grads, states, step)
        rule.plain(plain, grads, others, step)
    torch.testing.assert_close(fast, plain, rtol=1e-12, atol=0)
    torch.testing.assert_close(states, others, rtol=1e-12, atol=0)


def test_elsewhere_than_on_the_cpu_the_whole_list_is_moved_at_once(monkeypatch):
    rule = part.build("optimizer", "sophia").obj
    monkeypatch.setattr(type(rule), "plain", None)
    p = torch.zeros(3, device="meta")
    rule.apply([p], [torch.ones_like(p)], [rule.init(p)], Step(t=1, lr=0.1))


RELEASE = {
    1: [0.99841309, 0.53203696, -0.41590042, -0.98837932, -0.64298998, 0.28361048],
    6: [0.99044683, 0.53440529, -0.40778004, -0.9795716, -0.64034505, 0.27835123],
    12: [0.98249963, 0.52734757, -0.40375134, -0.9706545, -0.63342056, 0.27537008],
}
"""Positions after these steps of SophiaG, github.com/Liuhong99/Sophia at a7e1572, sophia.py in float64: lr 0.01, betas
(0.965, 0.99), rho 0.05, weight decay 0.1, ``update_hessian()`` before the steps 1, 6 and 11, then ``step(bs=512)``."""


def test_as_the_authors_release(make_course):
    i = np.arange(6)
    course = make_course((2, 3))
    course.start = np.cos(i).reshape(2, 3)
    course.grads = [0.02 * np.sin(t + i).reshape(2, 3) for t in range(1, 13)]
    sampled = [0.2 * np.cos(3 * t + 2 * i).reshape(2, 3) for t in range(1, 13)]
    got, _ = follow(course, sampled, lr=0.01, weight_decay=0.1, samples=512, every=5)
    for t, wanted in RELEASE.items():
        np.testing.assert_allclose(got[t - 1].ravel(), wanted, atol=1e-8)
