"""Oracle of optimizer/adamw: the algorithm of the paper in NumPy, and torch's own AdamW."""

import numpy as np
import pytest
import torch

from metier.core import part
from metier.core.optim import Step


def formula(course, lr, wd, b1, b2, eps):
    p, m, v, out = course.start.copy(), 0.0, 0.0, []
    for t, g in enumerate(course.grads, start=1):
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2
        p = p - lr * wd * p
        p = p - lr * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
        out.append(p)
    return np.stack(out)


@pytest.mark.parametrize(("b1", "b2", "eps"), [(0.9, 0.999, 1e-8), (0.8, 0.95, 1e-2), (0.0, 0.5, 1e-3)])
def test_formula(course, b1, b2, eps):
    got = course.run("adamw", beta1=b1, beta2=b2, eps=eps)
    np.testing.assert_allclose(got, formula(course, 0.03, 0.1, b1, b2, eps), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_as_torch(course, dtype):
    got = course.run("adamw", dtype=dtype)
    wanted = course.follow(lambda p: torch.optim.AdamW([p], lr=0.03, weight_decay=0.1), dtype)
    np.testing.assert_allclose(got, wanted, rtol=1e-6 if dtype == torch.float32 else 1e-12, atol=1e-7)


def test_the_plain_path_is_the_formula(course):
    rule = part.build("optimizer", "adamw").obj
    p = torch.tensor(course.start)
    state, out = rule.init(p), []
    for t, g in enumerate(course.grads, start=1):
        rule.plain([p], [torch.tensor(g)], [state], Step(t=t, lr=0.03, weight_decay=0.1))
        out.append(p.numpy().copy())
    np.testing.assert_allclose(np.stack(out), formula(course, 0.03, 0.1, 0.9, 0.999, 1e-8), rtol=1e-9)


def test_a_gradient_in_another_layout_is_not_misread():
    """torch's fused kernel on the CPU walks through memory: a transposed gradient would be applied to wrong
    entries.
    """
    rule = part.build("optimizer", {"adamw": {"eps": 0.1}}).obj
    p, q = torch.zeros(5, 3).t(), torch.zeros(3, 5)
    grad = torch.arange(15.0).view(3, 5)
    rule.apply([p], [grad], [rule.init(p)], Step(t=1, lr=0.1))
    rule.plain([q], [grad], [rule.init(q)], Step(t=1, lr=0.1))
    torch.testing.assert_close(p, q)


def test_steps_are_as_long_as_the_learning_rate_whatever_the_scale(matrix):
    """Multiplying the loss by 1000 changes nothing but the weight of eps."""
    scaled = type(matrix)((4, 6))
    scaled.grads = [1000 * g for g in scaled.grads]
    np.testing.assert_allclose(matrix.run("adamw", eps=0.0), scaled.run("adamw", eps=0.0), rtol=1e-9)
