"""Oracle of probe/gradient-noise-scale: a regression whose gradient noise is known, and the estimators by
hand.

Bugs it is meant to catch: b and B exchanged, the mean of norms for the norm of the mean, a biased |G|^2,
units mixed up.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from metier.core import part
from metier.core.batch import Tokens
from metier.core.engine import Engine
from metier.core.errors import UsageError
from metier.core.models import Bundle
from metier.core.probing import Probe
from metier.testing import check_part
from metier.testing._tiny import layout

DIM = 20


class Noisy(nn.Module):
    """Loss ``mean_i w . (g + e_i)``: the gradient of example i is ``g + e_i`` exactly."""

    def __init__(self, gradients):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(DIM))
        self.gradients = gradients

    def forward(self, batch):
        rows = self.gradients[[int(i) for i in batch.ids]]
        return (rows @ self.w).sum(), len(rows), {}


def probe(gradients, small):
    model = Noisy(gradients)
    made = [
        replace(layout([[1, 2]] * small), ids=tuple(str(i) for i in range(at, at + small)))
        for at in range(0, len(gradients) - small + 1, small)
    ]
    return Probe(Bundle(model, None, "m", "m", ""), model, Tokens, made, Engine(torch.device("cpu"), "fp32", "ddp"))


def measure(*args):
    return part.build("probe", "gradient-noise-scale").obj(probe(*args))


def test_contract():
    check_part("probe/gradient-noise-scale")


def test_by_hand():
    g = torch.zeros(4, DIM)
    g[:, 0] = torch.tensor([1.0, 3.0, 2.0, 2.0])
    g[:, 1] = torch.tensor([1.0, 1.0, -1.0, -1.0])
    found = measure(g, 2)
    # G_b = (2, 1), (2, -1): s = 5; G_B = (2, 0): 4. |G|^2 = (4*4 - 2*5)/2 = 3; tr S = (5 - 4)/(1/2 - 1/4) = 4
    assert found["gradient_squared_norm"] == pytest.approx(3)
    assert found["gradient_variance"] == pytest.approx(4)
    assert found["noise_scale"] == pytest.approx(4 / 3)


def test_unbiased_over_many_draws():
    rng = np.random.default_rng(0)
    mean, spread = np.full(DIM, 0.1), np.linspace(0.2, 1.0, DIM)
    found = []
    for _ in range(300):
        g = mean + spread * rng.standard_normal((24, DIM))
        found.append(measure(torch.tensor(g, dtype=torch.float32), 3))
    for name, truth in (("gradient_squared_norm", (mean**2).sum()), ("gradient_variance", (spread**2).sum())):
        values = np.array([f[name] for f in found])
        assert abs(values.mean() - truth) < 4 * values.std() / np.sqrt(len(values)), name


def test_pure_noise_is_said():
    g = torch.tensor([[1.0] + [0.0] * (DIM - 1), [-1.0] + [0.0] * (DIM - 1)])
    found = measure(g, 1)
    assert found["noise_scale"] is None
    assert "noise" in found["note"]


def test_needs_two_equal_layouts():
    with pytest.raises(UsageError, match="two or more"):
        measure(torch.randn(3, DIM), 3)
