"""Oracle of optimizer/gi-adam: the recursion in NumPy, the closed form for a constant gradient, AdamW afterwards.

Bugs it is meant to catch: v at g² only after its first average, bias correction dropped, the start repeated at t = 2.
"""

import numpy as np
import pytest
import torch

from metier.core import part
from metier.core.optim import Optimizer


def formula(course, lr, wd, b1, b2, eps):
    p, m, v, out = course.start.copy(), np.zeros_like(course.start), course.grads[0] ** 2, []
    for t, g in enumerate(course.grads, 1):
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2
        p = (1 - lr * wd) * p - lr * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
        out.append(p)
    return np.stack(out)


@pytest.mark.parametrize(("b1", "b2", "eps"), [(0.9, 0.999, 1e-8), (0.5, 0.8, 1e-2)])
def test_formula(course, b1, b2, eps):
    got = course.run("gi-adam", beta1=b1, beta2=b2, eps=eps)
    np.testing.assert_allclose(got, formula(course, 0.03, 0.1, b1, b2, eps), rtol=1e-10)


def test_a_constant_gradient_gives_an_automatic_warmup(matrix):
    matrix.grads = [matrix.grads[0]] * len(matrix.grads)
    got = np.concatenate([matrix.start[None], matrix.run("gi-adam", weight_decay=0.0, eps=0.0, beta2=0.99)])
    for t in range(1, len(got)):
        expected = 0.03 * np.sqrt(1 - 0.99**t) * np.sign(matrix.grads[0])
        np.testing.assert_allclose(got[t - 1] - got[t], expected, rtol=1e-9)


def test_one_at_a_time_is_the_same(matrix):
    rule = part.build("optimizer", "gi-adam").obj
    p, q = (torch.nn.Parameter(torch.tensor(matrix.start)) for _ in range(2))
    fused = Optimizer([p], rule, lr=0.03, weight_decay=0.1)
    for g in matrix.grads:
        p.grad = torch.tensor(g)
        fused.step()
    state = rule.init(q.detach())
    from metier.core.optim import Step

    for t, g in enumerate(matrix.grads, 1):
        rule.plain([q.detach()], [torch.tensor(g)], [state], Step(t=t, lr=0.03, weight_decay=0.1, peak=0.03))
    torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-10, atol=0)


def test_a_zero_first_gradient_starts_as_adamw(matrix):
    matrix.grads[0] = np.zeros_like(matrix.grads[0])
    np.testing.assert_allclose(matrix.run("gi-adam"), matrix.run("adamw"), rtol=1e-12)
