"""Oracle of probe/update-size: sizes of one step worked out in NumPy, SNR on gradients whose noise is known.

Bugs it is meant to catch: the update over the new weights, angles by an inaccurate cosine, the probe's own layout in
the gradient, per-layout and whole-batch SNR exchanged, weights not put back, a norm over all tensors.
"""

import math

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
from metier.testing._tiny import layouts, tiny
from metier.testing.probe import tiny_probe


def measure(probe, **options):
    found = part.build("probe", {"update-size": options}).obj(probe)
    return found, {r["layer"]: r for r in found["layers"]}


def test_contract():
    check_part("probe/update-size")


def test_sizes_by_hand():
    """SGD without momentum: ΔW = -lr (ḡ + wd W), all from the gradients of the first five layouts."""
    probe = tiny_probe(6)
    found, rows = measure(probe, rule={"sgd-momentum": {"beta": 0.0}}, lr=0.05, weight_decay=0.2)
    assert (found["gradient_layouts"], found["held_out"], found["lr"]) == (5, True, 0.05)
    grads = [probe.gradient(x) for x in probe.layouts[:5]]
    seen = {}
    name = "model.layers.0.mlp.down_proj"
    layer = probe.model.get_submodule(name)
    handle = layer.register_forward_pre_hook(lambda m, a: seen.update(x=a[0]))
    last = probe.layouts[-1]
    with torch.no_grad():
        probe.model(input_ids=last.input_ids)
    handle.remove()
    x = seen["x"][last.group > 0].double().numpy()
    w = layer.weight.detach().double().numpy()
    delta = -0.05 * (np.mean([g[f"{name}.weight"].double().numpy() for g in grads], 0) + 0.2 * w)
    row = rows[f"{name}.weight"]
    assert row["l2"] == pytest.approx(np.linalg.norm(delta), rel=1e-4)
    assert row["rms"] == pytest.approx(np.sqrt((delta**2).mean()) / 0.05, rel=1e-4)
    assert row["rrc"] == pytest.approx(np.linalg.norm(x @ delta.T) / np.linalg.norm(x @ w.T), rel=1e-4)
    new = w + delta
    cosine = (w * new).sum() / np.linalg.norm(w) / np.linalg.norm(new)
    assert row["angle"] == pytest.approx(math.acos(cosine), rel=1e-2)
    assert rows["model.embed_tokens.weight"]["rrc"] is None


def test_first_steps_of_the_rules():
    """The first step of AdamW is a sign step of size lr, LionA's is √κ of it, LionAR's is the angle it was told."""
    probe = tiny_probe(4)
    adam = measure(probe, rule="adamw", lr=1e-3, weight_decay=0.0)[0]
    lion = measure(probe, rule={"lion-a": {"beta": 0.9}}, lr=1e-3, weight_decay=0.0)[0]
    assert adam["median_rms"] == pytest.approx(1.0, rel=0.02)
    assert lion["median_rms"] == pytest.approx(math.sqrt(1 / 19), rel=0.02)
    _, rows = measure(probe, rule="lion-ar", lr=1e-3, weight_decay=0.1)
    angle = math.atan(math.sqrt(2 * 1e-3 * 0.1 / 19))
    hidden = [r["angle"] for n, r in rows.items() if "proj" in n]
    assert hidden == pytest.approx([angle] * len(hidden), rel=1e-3)


class Noisy(nn.Module):
    """Loss ``mean over the layout of <W, S + E_i>``: the gradient of a layout is known."""

    def __init__(self, gradients):
        super().__init__()
        self.w = nn.Parameter(torch.ones(4, 50))
        self.gradients = gradients

    def forward(self, layout):
        rows = torch.stack([self.gradients[int(i.split(":")[1])] for i in layout.ids])
        return (rows * self.w).sum(), len(rows), {}


def noisy_probe(signal, noise, count, source):
    model = Noisy([])
    made = []
    for _ in range(count):
        batch = layouts(1)[0]
        ids = tuple(f"rows:{len(model.gradients) + i}" for i in range(len(batch.ids)))
        model.gradients += [signal + noise * torch.randn(4, 50, generator=source) for _ in ids]
        made.append(type(batch)(**{**batch.__dict__, "ids": ids}))
    return Probe(Bundle(model, None, "m", "m", ""), model, Tokens, made, Engine(torch.device("cpu"), "fp32", "ddp"))


def test_signal_to_noise_of_the_whole_gradient():
    """3 examples a layout, 20 layouts in the gradient: SNR = 60 (signal/noise)² per entry."""
    source = torch.Generator().manual_seed(0)
    found = []
    for _ in range(20):
        probe = noisy_probe(torch.full((4, 50), 0.3), 1.0, 21, source)
        found.append(measure(probe, rule="adamw")[1]["w"]["snr"])
    assert np.mean(found) == pytest.approx(60 * 0.09, rel=0.1)


def test_few_layouts():
    one, rows = measure(tiny_probe(1))
    assert (one["gradient_layouts"], one["held_out"], one["median_snr"]) == (1, False, None)
    assert rows["model.layers.0.self_attn.q_proj.weight"]["rrc"] > 0
    assert measure(tiny_probe(2))[0]["median_snr"] is not None
    with pytest.raises(UsageError, match="needs data"):
        measure(tiny_probe(0))


def test_wrong_rules_are_refused():
    with pytest.raises(UsageError, match="adamw"):
        measure(tiny_probe(2), rule="adanw")
    with pytest.raises(UsageError, match="momentun"):
        measure(tiny_probe(2), rule={"sgd-momentum": {"momentun": 0.9}})


def test_weights_are_put_back_when_the_step_fails():
    run = tiny()
    probe = Probe(run.context.bundle, run.context.module, Tokens, layouts(3), run.context.engine)
    before = {n: p.detach().clone() for n, p in probe.model.named_parameters()}
    with pytest.raises(UsageError):
        measure(probe, rule="sophia")
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in probe.model.named_parameters())
