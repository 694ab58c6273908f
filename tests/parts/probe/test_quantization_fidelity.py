"""Oracle of probe/quantization-fidelity: inputs kept in a plain forward pass, rounded and compared in float64 numpy.

Bugs it is meant to catch: padding in the sums, outputs instead of inputs, a mean of tokens' cosines, SNR of amplitudes or in
nepers, compensation that is not added, an adapter's own factors among the layers, values that JSON cannot hold.
"""

import json
import math

import numpy as np
import pytest
import torch

from metier.core import models, part
from metier.core.adapt import attach
from metier.core.errors import UsageError
from metier.core.probing import undisturbed
from metier.parts.probe.quantization_fidelity import quantization_fidelity
from metier.testing import check_part
from metier.testing._tiny import layouts, tiny
from metier.testing.probe import Probe, Tokens

LEVELS = np.array([-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6])
INSIDE = {
    "lab/qwen2-1m": [f"self_attn.{n}_proj" for n in "qkvo"] + [f"mlp.{n}_proj" for n in ("gate", "up", "down")],
    "lab/gpt2-1m": ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"],
}


def test_contract():
    check_part("probe/quantization-fidelity")


def probe(name="lab/qwen2-1m", *changes):
    model = models.load(name, seed=0).model
    for change in changes:
        model = part.build("model", change).obj(model)
    ctx = tiny(model=model.double()).context
    return Probe(ctx.bundle, ctx.module, Tokens, layouts(2, seed=7), ctx.engine)


def measure(p, **options):
    with undisturbed(p):
        return quantization_fidelity(p, **options)


def inputs(p, paths):
    """Inputs of layers at real tokens, an array for each layout."""
    kept = {n: [] for n in paths}
    for layout in p.layouts:
        seen = {}
        hooks = [
            p.model.get_submodule(n).register_forward_hook(lambda m, a, o, n=n, seen=seen: seen.update({n: a[0]})) for n in paths
        ]
        p.loss(layout)
        for h in hooks:
            h.remove()
        for n in paths:
            kept[n].append(seen[n].detach().numpy()[layout.group.numpy() > 0])
    return kept


def rounded(x, alpha, compensate, quantile, group):
    axis = 1 if quantile == "token" else None
    n = x.shape[1] if axis else x.size
    m = round((1 - alpha) * n)
    order = np.sort(x, axis=axis)
    c = np.clip(x, order[:, [m]], order[:, [n - 1 - m]]) if axis else np.clip(x, order[m], order[n - 1 - m])
    largest = np.abs(c).max(axis=1 if group == "token" else None, keepdims=True)
    s = 6 / np.where(largest > 0, largest, 6)
    q = LEVELS[np.searchsorted((LEVELS[1:] + LEVELS[:-1]) / 2, c * s, side="right")] / s
    return (q + (x - c) if compensate else q), (x != c).sum()


@pytest.mark.parametrize(("quantile", "group"), [("token", "token"), ("tensor", "token"), ("tensor", "tensor")])
@pytest.mark.parametrize("name", list(INSIDE))
def test_against_numpy(name, quantile, group):
    p = probe(name)
    got = measure(p, quantile=quantile, group=group)
    first = next(n for n, m in p.model.named_modules() if m is models.blocks(p.model)[0])
    kept = inputs(p, [f"{first}.{n}" for n in INSIDE[name]])
    assert len(got["layers"]) == 4 * len(INSIDE[name])
    for layer, arrays in kept.items():
        rows = got["layers"][layer]
        assert [(r["alpha"], r["compensate"]) for r in rows] == [
            (1.0, False), (0.999, False), (0.999, True), (0.99, False), (0.99, True), (0.97, False), (0.97, True),
        ]  # fmt: skip
        x = np.concatenate(arrays).ravel()
        for row in rows:
            made = [rounded(a, row["alpha"], row["compensate"], quantile, group) for a in arrays]
            q = np.concatenate([m[0] for m in made]).ravel()
            assert row["cosine"] == pytest.approx(x @ q / np.linalg.norm(x) / np.linalg.norm(q), rel=1e-9)
            assert row["mse"] == pytest.approx(np.mean((x - q) ** 2), rel=1e-9)
            assert row["snr"] == pytest.approx(10 * math.log10((x**2).sum() / ((x - q) ** 2).sum()), rel=1e-9)
            assert row["clamped"] == pytest.approx(sum(m[1] for m in made) / len(x))
    for i, row in enumerate(got["mean"]):
        for key in ("cosine", "mse", "snr"):
            assert row[key] == pytest.approx(np.mean([r[i][key] for r in got["layers"].values()]))


def test_clamping_helps_where_there_are_outliers():
    """The card's order with compensation: no clamp, 0.999, 0.99, 0.97. Without it energy is lost with the outliers."""
    p = probe()
    with torch.no_grad():
        for block in models.blocks(p.model):
            for norm in (block.input_layernorm, block.post_attention_layernorm):
                norm.weight[5] *= 20
    rows = measure(p, quantile="tensor")["mean"]
    chosen = [r for r in rows if r["compensate"] or r["alpha"] == 1]
    snr = [r["snr"] for r in chosen]
    assert snr == sorted(snr)
    assert snr[-1] > snr[0] + 3


def test_below_adapters_and_parts_that_round():
    plain = measure(probe())
    for changed in (probe("lab/qwen2-1m", {"fp4": {"activations": "none", "weights": "none"}}), probe("lab/qwen2-1m")):
        if not any(hasattr(m, "fp4") for m in changed.model.modules()):
            attach(changed.model, part.build("adapter", "lora"))
        assert list(measure(changed)["layers"]) == list(plain["layers"])
        assert measure(changed)["mean"][0]["snr"] == pytest.approx(plain["mean"][0]["snr"], rel=1e-6)


def test_what_has_no_value_is_none():
    p = probe()
    with torch.no_grad():
        for block in models.blocks(p.model):
            block.mlp.up_proj.weight.zero_()
    got = measure(p, alphas=(1.0,))
    row = got["layers"]["model.layers.0.mlp.down_proj"][0]
    assert (row["cosine"], row["snr"], row["mse"], row["clamped"]) == (None, None, 0.0, 0.0)
    assert got["mean"][0]["cosine"] is not None
    json.dumps(got, allow_nan=False)


def test_refusals():
    with pytest.raises(UsageError, match="alpha"):
        measure(probe(), alphas=())
    with pytest.raises(UsageError):
        part.build("probe", {"quantization-fidelity": {"alphas": [0.4]}})
