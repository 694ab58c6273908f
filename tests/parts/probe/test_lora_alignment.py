"""Oracle of probe/lora-alignment: SciPy's principal angles on gradients by autograd.

Bugs it is meant to catch: the gradient with the adapter on, left and right exchanged, the gradient's sign, angles between
unnormalised factors, adapters left switched off.
"""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles

from metier.core import part
from metier.core.adapt import attach
from metier.core.basegrad import base_gradients
from metier.testing import check_part
from metier.testing._tiny import same, weights
from metier.testing.adapter import disturb
from metier.testing.probe import tiny_probe


def measure(probe):
    found = part.build("probe", {"lora-alignment": {}}).obj(probe)
    json.dumps(found, allow_nan=False)
    return found, {r["layer"]: r for r in found["layers"]}


def adapted(**options):
    """A probe in float64 with LoRA on its layers, and the gradients at the weights before."""
    probe = tiny_probe(3)
    probe.model.double()
    total = sum(probe.module(x)[0] for x in probe.layouts)
    named = dict(probe.model.named_parameters())
    grads = torch.autograd.grad(total, list(named.values()), allow_unused=True)
    gradients = {n: g.numpy() for n, g in zip(named, grads, strict=True) if g is not None}
    attached = attach(probe.model, part.build("adapter", {"lora": {"rank": 3, **options}}))
    return probe, attached, gradients


def test_contract():
    check_part("probe/lora-alignment")


def test_by_hand():
    probe, attached, gradients = adapted(alpha=6.0)
    disturb(attached, 0.3)
    before = weights(probe.model)
    found, rows = measure(probe)
    assert found["adapters"] == len(attached.adapters) == len(rows)
    assert same(weights(probe.model), before)
    assert all(a.enabled for a in attached.adapters.values())
    for name, down, up in attached.pairs():
        a, b, g = down.detach().numpy(), up.detach().numpy(), gradients[f"{name}.weight"]
        u, _, vt = np.linalg.svd(-g)
        left, right = (np.cos(subspace_angles(x, y)) for x, y in ((b, u[:, :3]), (a.T, vt[:3].T)))
        row = rows[name]
        assert row["left"] == pytest.approx((left**2).mean(), rel=1e-8)
        assert row["left_least"] == pytest.approx(left.min(), rel=1e-6)
        assert row["right"] == pytest.approx((right**2).mean(), rel=1e-8)
        assert row["left_top"] == pytest.approx(abs(np.linalg.svd(b)[0][:, 0] @ u[:, 0]), rel=1e-8)
        assert row["right_top"] == pytest.approx(abs(np.linalg.svd(a)[2][0] @ vt[0]), rel=1e-8)
        assert (row["left_chance"], row["right_chance"]) == (3 / len(b), 3 / a.shape[1])
        norms = np.linalg.norm(a) ** 2 + np.linalg.norm(b) ** 2
        assert row["size"] == pytest.approx(np.sqrt(norms), rel=1e-10)
        assert row["balance"] == pytest.approx(np.linalg.norm(b.T @ b - a @ a.T) / norms, rel=1e-10)
        cosine = -(b @ a * g).sum() / np.linalg.norm(b @ a) / np.linalg.norm(g)
        assert row["descent"] == pytest.approx(cosine, rel=1e-8)
    assert found["median_left"] == np.median([r["left"] for r in rows.values()])


def test_a_spectral_start_is_aligned_and_balanced():
    probe = tiny_probe(3)
    probe.model.double()
    attached = attach(probe.model, part.build("adapter", {"spectral-lora": {"rank": 3, "compensate": False, "singular": "sqrt"}}))
    for name, gradient in base_gradients(probe.module, attached.adapters, probe.layouts, probe.engine).items():
        adapter = attached.adapters[name]
        with torch.no_grad():
            for key, value in adapter.start(gradient).items():
                adapter.own_state()[key].copy_(value)
    found, rows = measure(probe)
    for row in rows.values():
        assert row["left"] == pytest.approx(1, abs=1e-8)
        assert row["right_least"] == pytest.approx(1, abs=1e-8)
        assert row["left_top"] == pytest.approx(1, abs=1e-8)
        assert row["balance"] < 1e-12
        assert row["descent"] > 0.2
    assert found["median_balance"] < 1e-12


def test_loras_start_and_models_without_adapters():
    probe, _, _ = adapted()
    _, rows = measure(probe)
    row = next(iter(rows.values()))
    assert (row["left"], row["left_top"], row["descent"]) == (None, None, None)
    assert row["balance"] == pytest.approx(np.linalg.norm(np.ones(1)) * row["balance"])
    assert row["right"] is not None
    plain = part.build("probe", {"lora-alignment": {}}).obj(replace(tiny_probe(2)))
    assert plain == {"adapters": 0, "layers": []}
