"""Oracle of schedule/linear: the straight line, and transformers' schedule."""

import pytest
import torch
from transformers import get_linear_schedule_with_warmup

from metier.core import part
from metier.core.clock import Clock
from metier.core.schedule import Schedule


def test_as_transformers():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_linear_schedule_with_warmup(optimizer, 0, 50).lr_lambdas[0]
    ours = Schedule(part.build("schedule", "linear"))
    assert [ours.at(Clock(s, 50)) for s in range(51)] == pytest.approx([theirs(s) for s in range(51)])


def test_after_warmup_as_transformers():
    """The warmup differs (ours does not start at 0); the decay that follows is the same."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_linear_schedule_with_warmup(optimizer, 10, 50).lr_lambdas[0]
    ours = Schedule(part.build("schedule", "linear"), warmup=10)
    assert [ours.at(Clock(s, 50)) for s in range(10, 51)] == pytest.approx([theirs(s) for s in range(10, 51)])


def test_final():
    ours = Schedule(part.build("schedule", {"linear": {"final": 0.2}}))
    assert [ours.at(Clock(s, 4)) for s in range(5)] == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])
