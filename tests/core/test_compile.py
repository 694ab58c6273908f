"""A compiled step of an optimizer, and a step on a compiled model, move weights as the plain one does."""

import copy

import pytest
import torch
from torch import nn

from metier.core import part
from metier.core.optim import build


def trained(net, name, *, compiled_step=False, compiled_model=False):
    net = copy.deepcopy(net)
    forward = torch.compile(net, backend="eager") if compiled_model else net
    optimizer = build(forward, part.build("optimizer", name), weight_decay=0.1)
    step = torch.compile(optimizer.step, backend="eager") if compiled_step else optimizer.step
    for t in range(4):
        optimizer.zero_grad()
        forward(torch.randn(8, 6, generator=torch.Generator().manual_seed(t))).square().mean().backward()
        step()
    return [p.detach() for p in net.parameters()]


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_compiling_changes_nothing(name):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 5))
    plain = trained(net, name)
    torch._dynamo.reset()
    torch.testing.assert_close(trained(net, name, compiled_step=True), plain, rtol=0, atol=0)
    torch.testing.assert_close(trained(net, name, compiled_model=True), plain, rtol=0, atol=1e-6)
