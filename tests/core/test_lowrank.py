"""The fused low-rank layer equals separate operations: values, gradients, second derivatives.

Bugs it is meant to catch: the scale missing or applied twice in a gradient, an in-place change of something saved, a bias lost,
gradients for an input that needs none, no graph for a second derivative.
"""

import pytest
import torch
from torch.nn import functional as F

from metier.core.lowrank import low_rank_linear

torch.manual_seed(0)
SHAPES = [(5, 7, 4, 2), (1, 3, 6, 1), (9, 4, 4, 4)]


def tensors(n, inner, outer, rank, bias, dtype=torch.float64):
    made = [torch.randn(s, dtype=dtype) for s in ((2, n, inner), (outer, inner), (rank, inner), (outer, rank))]
    return made[0], made[1], torch.randn(outer, dtype=dtype) if bias else None, made[2], made[3]


def plain(x, weight, bias, down, up, scale):
    return F.linear(x, weight, bias) + scale * (x @ down.T @ up.T)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape, bias):
    given = tensors(*shape, bias)
    seed = torch.randn(2, shape[0], shape[2], dtype=torch.float64)
    found = []
    for f in (low_rank_linear, plain):
        x, weight, b, down, up = (None if t is None else t.clone() for t in given)
        for t in (x, down, up):
            t.requires_grad_()
        y = f(x, weight, b, down, up, 0.7)
        (y * seed).sum().backward()
        assert weight.grad is None
        found.append((y.detach(), x.grad, down.grad, up.grad))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_an_input_without_gradient():
    x, weight, b, down, up = tensors(5, 7, 4, 2, bias=True)
    down.requires_grad_()
    up.requires_grad_()
    low_rank_linear(x, weight, b, down, up, 2.0).sum().backward()
    expected = torch.autograd.grad(plain(x, weight, b, down, up, 2.0).sum(), (down, up))
    torch.testing.assert_close((down.grad, up.grad), expected)


def test_second_derivative():
    x, weight, b, down, up = tensors(3, 4, 3, 2, bias=True)
    leaves = [t.requires_grad_() for t in (x, down, up)]

    def f(x, down, up):
        return low_rank_linear(x, weight, b, down, up, 1.5).tanh()

    assert torch.autograd.gradcheck(f, leaves)
    assert torch.autograd.gradgradcheck(f, leaves)
