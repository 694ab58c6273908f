"""Oracle of probe/activation-norms: norms of each layer's tensors computed in numpy from a plain forward pass, and
gradients by finite differences.

Bugs it is meant to catch: padding in the means, a mean of squares, queries, keys and values as three vectors, gradients of
one projection instead of their common input, of the mean instead of the sum, outputs behind a guard's norm.
"""

import json
import math

import numpy as np
import pytest
import torch

from metier.core import models, part
from metier.core.probing import undisturbed
from metier.parts.probe.activation_norms import activation_norms
from metier.testing import check_part
from metier.testing._tiny import layouts, tiny
from metier.testing.probe import Probe, Tokens


def test_contract():
    check_part("probe/activation-norms")


def probe(name="lab/llama-50k", *guards):
    model = models.load(name, seed=0).model
    for guard in guards:
        model = part.build("model", guard).obj(model)
    ctx = tiny(model=model.double()).context
    return Probe(ctx.bundle, ctx.module, Tokens, layouts(3, seed=7), ctx.engine)


def measure(p, **options):
    with undisturbed(p):
        return activation_norms(p, **options)


NAMES = {
    "lab/llama-50k": {
        "qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], "proj": ["self_attn.o_proj"],
        "fc1": ["mlp.gate_proj", "mlp.up_proj"], "fc2": ["mlp.down_proj"],
    },
    "lab/gpt2-1m": {"qkv": ["attn.c_attn"], "proj": ["attn.c_proj"], "fc1": ["mlp.c_fc"], "fc2": ["mlp.c_proj"]},
}  # fmt: skip


def expected(p, name):
    """Norms of weights, inputs and outputs of every block, in numpy."""
    found = []
    for block in models.blocks(p.model):
        row = {}
        for group, paths in NAMES[name].items():
            weight, inputs, outputs = 0.0, [], []
            for layout in p.layouts:
                kept = {}
                handles = [
                    block.get_submodule(n).register_forward_hook(lambda m, a, o, n=n, kept=kept: kept.update({n: (a[0], o)}))
                    for n in paths
                ]
                p.loss(layout)
                for h in handles:
                    h.remove()
                real = layout.group.numpy() > 0
                x = kept[paths[0]][0].detach().numpy()[real]
                y = np.concatenate([kept[n][1].detach().numpy()[real] for n in paths], -1)
                inputs += list(np.linalg.norm(x, axis=-1))
                outputs += list(np.linalg.norm(y, axis=-1))
            weight = math.sqrt(sum((block.get_submodule(n).weight.detach().numpy() ** 2).sum() for n in paths))
            row[group] = {"weight": weight, "input": np.mean(inputs), "output": np.mean(outputs)}
        found.append(row)
    return found


@pytest.mark.parametrize("name", list(NAMES))
def test_norms_against_numpy(name):
    p = probe(name)
    got, want = measure(p, scale="linear", gradients=False)["layers"], expected(p, name)
    logs = measure(p)["layers"]
    for g, w, log in zip(got, want, logs, strict=True):
        for group, values in w.items():
            assert set(g[group]) == {"weight", "input", "output"}
            for key, value in values.items():
                assert g[group][key] == pytest.approx(value, rel=1e-6)
                assert log[group][key] == pytest.approx(math.log2(value), abs=1e-5)


@pytest.mark.parametrize("group", ["qkv", "fc1"])
def test_input_gradients_by_differences(group):
    """Central differences of the summed loss for every entry of the input that the layers of a group share."""
    p = probe()
    p = Probe(p.bundle, p.module, p.reads, p.layouts[:1], p.engine)
    got = measure(p, scale="linear")["layers"][1][group]["input_gradient"]
    layout, block = p.layouts[0], models.blocks(p.model)[1]
    shift = torch.zeros(*layout.group.shape, 16, dtype=torch.float64)
    handles = [
        block.get_submodule(n).register_forward_pre_hook(lambda m, args: (args[0] + shift,))
        for n in NAMES["lab/llama-50k"][group]
    ]
    norms = []
    with undisturbed(p):
        for r, t in torch.nonzero(layout.group > 0).tolist():
            gradient = []
            for d in range(16):
                ends = []
                for by in (1e-2, -1e-2):
                    shift[r, t, d] = by
                    ends.append(p.loss(layout)[0])
                shift[r, t, d] = 0
                gradient.append((ends[0] - ends[1]) / 2e-2)
            norms.append(np.linalg.norm(gradient))
    for handle in handles:
        handle.remove()
    assert got == pytest.approx(np.mean(norms), rel=1e-3)


def test_logits_and_entropy():
    p = probe()
    got = measure(p)["layers"]
    again = measure(p)["layers"]
    assert got == again
    for row in got:
        assert row["max_logit"] > 0
        assert 0 < row["entropy"] < math.log(9)


def test_behind_guards_the_plain_layer_is_measured():
    plain = measure(probe(), scale="linear")["layers"]
    guarded = measure(probe("lab/llama-50k", {"layer-scale": {"init": 0.0}}, "qk-norm"), scale="linear")["layers"]
    assert guarded[0]["qkv"]["output"] == pytest.approx(plain[0]["qkv"]["output"], rel=1e-6)
    assert guarded[0]["fc2"]["weight"] == plain[0]["fc2"]["weight"]
    assert guarded[0]["fc2"]["output"] > 0
    json.dumps(measure(probe("lab/llama-50k", "sigma-reparam")), allow_nan=False)


def test_what_is_frozen_has_no_gradient():
    p = probe()
    p.model.requires_grad_(False)
    p.model.model.norm.weight.requires_grad_(True)
    rows = measure(p)["layers"]
    assert all(row[g]["input_gradient"] is None for row in rows for g in ("qkv", "proj", "fc1", "fc2"))
