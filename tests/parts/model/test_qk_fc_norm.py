"""Oracle of model/qk-fc-norm: attention in float64 numpy, and the norms on the outputs of both branches.

Bugs it is meant to catch: the norm on the input of the output layer, before its bias, around the residual sum, only one
branch normed, queries and keys left alone.
"""

import numpy as np
import pytest
import torch
import transformers

from metier.core import models
from metier.core.errors import UsageError
from metier.testing import check_part


def test_contract():
    check_part("model/qk-fc-norm")


def test_attention_against_numpy(lab, family, kind):
    model, layout = lab.load(family), lab.rows(kind)
    plain = lab.states(model)
    model = lab.apply("qk-fc-norm", model)
    attention = lab.attention_of(model)
    norm = (attention.o_proj if hasattr(attention, "o_proj") else attention.c_proj).norm
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2, len(norm.weight)))
        norm.bias.copy_(torch.linspace(-1, 1, len(norm.bias)))
    x, y = lab.observe(model, layout)
    raw = lab.expected(plain, model.config, x, layout, q=lab.layer_norm, k=lab.layer_norm)
    want = lab.layer_norm(raw, lab.array(norm.weight), lab.array(norm.bias))
    lab.assert_close(y, want, layout, rtol=1e-4, atol=1e-5)


def test_each_branch_adds_a_normalised_vector(lab, family):
    model = lab.apply("qk-fc-norm", lab.load(family), eps=1e-15)
    layout, block, kept = lab.rows("packed"), models.blocks(model)[1], {}
    handles = [
        block.mlp.register_forward_hook(lambda m, a, out: kept.update(mlp=lab.array(out))),
        block.register_forward_hook(lambda m, a, out: kept.update(x=lab.array(a[0]), y=lab.array(out))),
        lab.attention_of(model, 1).register_forward_hook(lambda m, a, out: kept.update(attention=lab.array(out[0]))),
    ]
    lab.observe(model, layout)
    for handle in handles:
        handle.remove()
    width, real = model.config.hidden_size, layout.group.numpy() > 0
    for branch in ("mlp", "attention"):
        np.testing.assert_allclose(kept[branch].mean(-1), 0, atol=1e-9)
        np.testing.assert_allclose(np.linalg.norm(kept[branch][real], axis=-1), width**0.5, rtol=1e-6)
    np.testing.assert_allclose(kept["y"], kept["x"] + kept["attention"] + kept["mlp"], rtol=1e-9)


def test_parameters(lab):
    model = lab.apply("qk-fc-norm", lab.load("lab/llama-50k"))
    names = [n for n, _ in models.blocks(model)[0].named_parameters() if ".norm." in n]
    assert sorted(names) == sorted(
        f"{place}.norm.{p}"
        for place in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.down_proj")
        for p in ("weight", "bias")
    )


def test_refusals(lab):
    sizes = dict(
        vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
    )
    with pytest.raises(UsageError, match="already normalises the outputs"):
        lab.apply("qk-fc-norm", transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**sizes, head_dim=8)))
    mixtral = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes))
    with pytest.raises(UsageError, match="no fc1 and fc2"):
        lab.apply("qk-fc-norm", mixtral)
    assert not [n for n, _ in mixtral.named_modules() if n.endswith(".norm") and "proj" in n]
