"""Oracle of optimizer/lion: algorithm 2 of the paper in NumPy."""

import numpy as np
import pytest
import torch

from metier.core import part
from metier.core.optim import Step


def formula(course, lr, wd, b1, b2):
    p, m, out = course.start.copy(), np.zeros_like(course.start), []
    for g in course.grads:
        c = b1 * m + (1 - b1) * g
        p = p - lr * (np.sign(c) + wd * p)
        m = b2 * m + (1 - b2) * g
        out.append(p)
    return np.stack(out)


@pytest.mark.parametrize(("b1", "b2"), [(0.9, 0.99), (0.5, 0.8), (0.0, 0.0)])
def test_formula(course, b1, b2):
    got = course.run("lion", beta1=b1, beta2=b2)
    np.testing.assert_allclose(got, formula(course, 0.03, 0.1, b1, b2), rtol=1e-12)


@pytest.mark.parametrize("scale", [1000, 1024])
def test_the_scale_of_the_loss_does_not_matter(matrix, scale):
    scaled = type(matrix)((4, 6))
    scaled.grads = [scale * g for g in scaled.grads]
    np.testing.assert_array_equal(matrix.run("lion"), scaled.run("lion"))


def test_an_entry_without_gradient_stays(matrix):
    for g in matrix.grads:
        g[1] = 0.0
    moved = matrix.run("lion", weight_decay=0.0)
    np.testing.assert_array_equal(moved[-1][1], matrix.start[1])
    assert (moved[-1][0] != matrix.start[0]).all()


def test_all_at_once_is_one_by_one():
    rule = part.build("optimizer", "lion").obj
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
    rule = part.build("optimizer", "lion").obj
    monkeypatch.setattr(type(rule), "plain", None)
    p = torch.zeros(3, device="meta")
    rule.apply([p], [torch.ones_like(p)], [rule.init(p)], Step(t=1, lr=0.1))
