"""Oracle of probe/critical-batch-size: a regression with known gradient noise, the jackknife by leaving layouts out.

Bugs it is meant to catch: examples and layouts mixed up, tensors added twice or left out of a role, a jackknife with a wrong
factor or one that leaves nothing out, the overhead formula, intervals turned round.
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

ROWS, DIM = 3, 4


class Noisy(nn.Module):
    """The gradient of example i is row i: the first entries of the matrix, the rest of the gain."""

    def __init__(self, gradients):
        super().__init__()
        self.matrix = nn.Parameter(torch.zeros(ROWS, DIM))
        self.gain = nn.Parameter(torch.zeros(gradients.shape[1] - ROWS * DIM))
        self.gradients = gradients

    def forward(self, batch):
        rows = self.gradients[[int(i) for i in batch.ids]]
        return (rows @ torch.cat([self.matrix.flatten(), self.gain])).sum(), len(rows), {}


def measure(gradients, small, **options):
    model = Noisy(gradients)
    made = [
        replace(layout([[1, 2]] * small), ids=tuple(str(i) for i in range(at, at + small)))
        for at in range(0, len(gradients) - small + 1, small)
    ]
    probe = Probe(Bundle(model, None, "m", "m", ""), model, Tokens, made, Engine(torch.device("cpu"), "fp32", "ddp"))
    return part.build("probe", {"critical-batch-size": options}).obj(probe)


def sample(count, seed=0, mean=0.3, width=20):
    rng = np.random.default_rng(seed)
    return torch.tensor(mean + rng.standard_normal((count, width)), dtype=torch.float64).float()


def oracle(g, small):
    """|G|², tr(S) and their ratio over layouts, by the pairs of different layouts."""
    means = g.reshape(-1, small, g.shape[1]).mean(1)
    k = len(means)
    products = means @ means.T
    signal = (products.sum() - np.trace(products)) / (k * (k - 1))
    return signal, small * means.var(0, ddof=1).sum()


def test_contract():
    check_part("probe/critical-batch-size")


@pytest.mark.parametrize("small", [1, 4])
def test_estimates_and_interval(small):
    g = sample(32)
    found = measure(g, small)
    exact = g.double().numpy()
    for name, columns in {"whole": slice(None), "matrices": slice(0, 12), "rest": slice(12, None)}.items():
        got = found if name == "whole" else found["roles"][name]
        signal, trace = oracle(exact[:, columns], small)
        assert got["gradient_squared_norm"] == pytest.approx(signal, rel=1e-4)
        assert got["gradient_variance"] == pytest.approx(trace, rel=1e-4)
        assert got["noise_scale"] == pytest.approx(trace / signal, rel=1e-4)
        groups = exact[:, columns].reshape(-1, small, len(exact[0, columns]))
        k = len(groups)
        left = [oracle(np.delete(groups, i, 0).reshape(-1, groups.shape[2]), small) for i in range(k)]
        ratios = np.array([s / t for s, t in left])
        error = 2 * np.sqrt((k - 1) / k * ((ratios - ratios.mean()) ** 2).sum())
        assert 1 / got["low"] == pytest.approx(signal / trace + error, rel=1e-3)
        if signal / trace > error:
            assert 1 / got["high"] == pytest.approx(signal / trace - error, rel=1e-3)
    assert found["layouts"] == 32 // small
    assert [(r["layer"], r["role"]) for r in found["layers"]] == [("matrix", "matrices"), ("gain", "rest")]
    assert found["layers"][0]["noise_scale"] == found["roles"]["matrices"]["noise_scale"]


def test_the_interval_covers():
    truth = 1 / 0.3**2
    found = [measure(sample(64, seed), 4) for seed in range(30)]
    inside = [f["low"] < truth and (f["high"] is None or truth < f["high"]) for f in found]
    assert sum(inside) >= 26


def test_definition():
    g = sample(32, mean=1.0)
    plain, other = measure(g, 4), measure(g, 4, reference=8.0, overhead=0.5)
    assert plain["critical_batch"] == pytest.approx(0.2 * plain["noise_scale"])
    assert other["critical_batch"] == pytest.approx(0.5 * plain["noise_scale"] + 12)
    assert other["critical_batch_low"] == pytest.approx(0.5 * plain["low"] + 12)
    assert plain["low"] < plain["noise_scale"] < plain["high"]


def test_noise_only():
    g = torch.eye(20) - torch.eye(20).roll(1, 0)
    found = measure(g, 1)
    assert found["noise_scale"] is None
    assert found["critical_batch"] is None
    assert found["high"] is None
    assert "noise" in found["note"]


def test_two_layouts_have_no_interval_and_one_is_refused():
    assert measure(sample(8), 4)["low"] is None
    with pytest.raises(UsageError, match="two or more"):
        measure(sample(4), 4)
