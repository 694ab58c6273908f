"""Oracle of schedule/cosine: the paper's formula in NumPy, and two trusted implementations."""

import numpy as np
import pytest
import torch
from transformers import get_cosine_schedule_with_warmup

from metier.core import part
from metier.core.clock import Clock
from metier.core.schedule import Schedule


def curve(steps, warmup=0.0, **options):
    schedule = Schedule(part.build("schedule", {"cosine": options}), warmup=warmup)
    return [schedule.at(Clock(s, steps)) for s in range(steps + 1)]


def test_formula():
    x = np.arange(41) / 40
    assert curve(40, final=0.1) == pytest.approx(0.1 + 0.9 * (1 + np.cos(np.pi * x)) / 2)


def test_as_transformers_after_warmup():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_cosine_schedule_with_warmup(optimizer, 10, 50).lr_lambdas[0]
    assert curve(50, warmup=10)[10:] == pytest.approx([theirs(s) for s in range(10, 51)])


def test_as_torch():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=30, eta_min=0.25)
    seen = []
    for _ in range(31):
        seen.append(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    assert curve(30, final=0.25) == pytest.approx(seen)
