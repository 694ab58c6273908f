"""Oracle of optimizer/dasgo: NumPy, and the authors' code."""

import math

import numpy as np
import pytest
import torch

from metier.core import part
from metier.core.optim import Optimizer, Step

AUTHORS = {
    (3, 5): (
        [2.04168653, -2.55489492, 0.41760269, -0.56880391, -0.45168918],
        [0.22530134, -0.35335872, -0.27998281, -0.66716141, -1.05529606],
    ),
    (5, 3): ([2.04096985, -2.55533528, 0.41749257], [-0.28020993, -0.66701120, -1.05516100]),
}
"""First and last row after six steps of lr 0.001, weight decay 0.1: infinity-stars/ASGO d3ef14b, optimizers/dasgo.py."""


def dasgo(**options):
    return part.build("optimizer", {"dasgo": options}).obj


def formula(course, lr=0.03, wd=0.1, beta1=0.9, beta2=0.95, eps=1e-8):
    w, m, v, out = course.start.copy(), 0.0, 0.0, []
    for g in course.grads:
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * (g**2).sum(axis=0)
        u = m / np.sqrt(v + eps)
        w = (1 - lr * wd) * w - lr * u * 0.2 * math.sqrt(w.size) / np.sqrt((u**2).sum())
        out.append(w)
    return np.stack(out)


@pytest.mark.parametrize("shape", [(4, 6), (6, 4)], ids=str)
@pytest.mark.parametrize("options", [{}, {"beta1": 0.5, "beta2": 0.8, "eps": 0.1}], ids=str)
def test_formula(make_course, shape, options):
    course = make_course(shape)
    np.testing.assert_allclose(course.run("dasgo", **options), formula(course, **options), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shape", AUTHORS, ids=str)
def test_as_the_authors(shape):
    rng = np.random.default_rng(3)
    p = torch.nn.Parameter(torch.tensor(rng.normal(size=shape).astype(np.float32)))
    optimizer = Optimizer([p], dasgo(), lr=1e-3, weight_decay=0.1)
    for _ in range(6):
        p.grad = torch.tensor(rng.normal(size=shape).astype(np.float32))
        optimizer.step()
    np.testing.assert_allclose(p.detach()[[0, -1]].numpy(), AUTHORS[shape], atol=1e-6)


def test_zero_columns_and_zero_gradients_stay():
    rule, g = dasgo(), torch.randn(1, 4, 6, generator=torch.Generator().manual_seed(0))
    g[..., 2] = 0
    state = {k: v[None] for k, v in rule.init(g[0]).items()}
    direction = rule.update(g, g, state, Step(t=1, lr=1.0))
    assert not direction[..., 2].any()
    assert direction.square().mean().sqrt().item() == pytest.approx(0.2, rel=1e-5)
    zero = torch.zeros_like(g)
    assert not rule.update(zero, g, {k: torch.zeros_like(v) for k, v in state.items()}, Step(t=1, lr=1.0)).any()


def test_scaling_the_gradient_changes_nothing():
    """Well above eps."""
    rule = dasgo()
    g = torch.randn(1, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    one, other = (rule.update(x, x, {k: v[None] for k, v in rule.init(g[0]).items()}, Step(t=1, lr=1.0)) for x in (g, 100 * g))
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)


def test_state_is_as_stated():
    assert sum(v.numel() for v in dasgo().init(torch.zeros(30, 20)).values()) == 600 + 20
