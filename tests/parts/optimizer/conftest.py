"""One tensor moved by a part on given gradients, in float64, to be compared with the paper's formula in
NumPy.
"""

import numpy as np
import pytest
import torch

from metier.core import part
from metier.core.optim import Optimizer

STEPS = 10


class Course:
    """Gradients that shrink, change sign and are sometimes exactly zero; and where the part goes on them."""

    def __init__(self, shape=(4, 6), seed=0):
        rng = np.random.default_rng(seed)
        self.start = rng.normal(size=shape)
        self.grads = [rng.normal(size=shape) * 0.5**t for t in range(STEPS)]
        self.grads[3] = np.where(np.abs(self.grads[3]) < 0.05, 0.0, self.grads[3])

    def run(self, name, *, lr=0.03, weight_decay=0.1, dtype=torch.float64, **options):
        """Positions after every step."""
        rule = part.build("optimizer", {name: options}).obj
        return self.follow(lambda p: Optimizer([p], rule, lr=lr, weight_decay=weight_decay), dtype)

    def follow(self, make, dtype=torch.float64):
        p = torch.nn.Parameter(torch.tensor(self.start, dtype=dtype))
        optimizer = make(p)
        seen = []
        for g in self.grads:
            p.grad = torch.tensor(g, dtype=dtype)
            optimizer.step()
            seen.append(p.detach().double().numpy().copy())
        return np.stack(seen)


@pytest.fixture(params=[(), (7,), (4, 6), (2, 3, 4)], ids=str)
def course(request):
    return Course(request.param)


@pytest.fixture
def matrix():
    return Course((4, 6))


@pytest.fixture
def make_course():
    return Course
