"""Oracle of optimizer/signum: the formula in NumPy, and its identity with Lion at equal betas."""

import numpy as np
import pytest
import torch

from metier.core import part
from metier.core.optim import Step


@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_formula(course, beta):
    p, m, out = course.start.copy(), np.zeros_like(course.start), []
    for g in course.grads:
        m = beta * m + (1 - beta) * g
        p = p * (1 - 0.03 * 0.1) - 0.03 * np.sign(m)
        out.append(p)
    np.testing.assert_allclose(course.run("signum", beta=beta), np.stack(out), rtol=1e-12)


def test_is_lion_with_equal_betas_to_the_last_bit(course):
    np.testing.assert_array_equal(course.run("signum", beta=0.9), course.run("lion", beta1=0.9, beta2=0.9))


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.99])
def test_is_lion_with_equal_betas_all_at_once(beta):
    rules = [part.build("optimizer", r).obj for r in ({"signum": {"beta": beta}}, {"lion": {"beta1": beta, "beta2": beta}})]
    source = torch.Generator().manual_seed(4)
    start = [torch.randn(s, generator=source) for s in [(), (5,), (4, 6)]]
    params = [[p.clone() for p in start] for _ in rules]
    states = [[r.init(p) for p in start] for r in rules]
    for t in range(1, 8):
        grads = [torch.randn(p.shape, generator=source) for p in start]
        for rule, p, s in zip(rules, params, states, strict=True):
            rule.together(p, grads, s, Step(t=t, lr=0.1, weight_decay=0.1))
    torch.testing.assert_close(params[0], params[1], rtol=0, atol=0)


def test_the_scale_of_the_loss_does_not_matter(matrix):
    scaled = type(matrix)((4, 6))
    scaled.grads = [1000 * g for g in scaled.grads]
    np.testing.assert_array_equal(matrix.run("signum"), scaled.run("signum"))


def test_an_entry_without_gradient_stays(matrix):
    for g in matrix.grads:
        g[1] = 0.0
    np.testing.assert_array_equal(matrix.run("signum", weight_decay=0.0)[-1][1], matrix.start[1])


def test_all_at_once_is_one_by_one():
    rule = part.build("optimizer", "signum").obj
    source = torch.Generator().manual_seed(3)
    shapes = [(), (5,), (4, 6), (2, 3, 4)]
    fast = [torch.randn(s, generator=source) for s in shapes]
    plain, states, others = ([f(p) for p in fast] for f in (torch.clone, rule.init, rule.init))
    for t in range(1, 6):
        grads = [torch.randn(s, generator=source) for s in shapes]
        step = Step(t=t, lr=0.1, weight_decay=0.1)
        rule.together(fast, grads, states, step)
        rule.plain(plain, grads, others, step)
    torch.testing.assert_close(fast, plain, rtol=0, atol=0)
    torch.testing.assert_close(states, others, rtol=0, atol=0)


def test_elsewhere_than_on_the_cpu_the_whole_list_is_moved_at_once(monkeypatch):
    rule = part.build("optimizer", "signum").obj
    monkeypatch.setattr(type(rule), "plain", None)
    p = torch.zeros(3, device="meta")
    rule.apply([p], [torch.ones_like(p)], [rule.init(p)], Step(t=1, lr=0.1))
