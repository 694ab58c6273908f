"""Oracle of model/qkv-norm: attention in float64 numpy on the residual stream; the identities of the card.

Bugs it is meant to catch: the norm before attention kept, values left alone, one mean over the wrong width, the same
gains for two of the three, the norm before the MLP removed instead.
"""

import numpy as np
import pytest
import torch
import transformers

from metier.core import models
from metier.core.errors import UsageError
from metier.core.forward import hidden_states
from metier.testing import check_part


def test_contract():
    check_part("model/qkv-norm")


def norms(attention):
    if hasattr(attention, "c_attn"):
        return attention.c_attn.norm, attention.c_attn.key_norm, attention.c_attn.value_norm
    return attention.q_proj.norm, attention.k_proj.norm, attention.v_proj.norm


@pytest.mark.parametrize("axis", ["head", "full"])
def test_against_numpy(lab, family, kind, axis):
    rng = np.random.default_rng(1)
    made = []

    def change(model):
        for norm in norms(lab.attention_of(model)):
            gain, bias = rng.normal(1, 0.5, norm.weight.shape), rng.normal(0, 0.5, norm.bias.shape)
            norm.weight.copy_(torch.from_numpy(gain))
            norm.bias.copy_(torch.from_numpy(bias))
            made.append((gain, bias))

    def normed(i):
        def f(x):
            y = x if axis == "head" else x.reshape(*x.shape[:2], -1)
            return lab.layer_norm(y, *made[i]).reshape(x.shape)

        return f

    model = lab.check("qkv-norm", family, kind, options={"norm_axis": axis}, change=change, q=normed(0), k=normed(1), v=normed(2))
    sizes = [n.weight.numel() for n in norms(lab.attention_of(model))]
    config = model.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    keys = getattr(config, "num_key_value_heads", config.num_attention_heads)
    assert sizes == ([head] * 3 if axis == "head" else [head * config.num_attention_heads, head * keys, head * keys])


def test_attention_sees_the_residual_stream_and_the_other_norm_stays(lab, family):
    model = lab.apply("qkv-norm", lab.load(family))
    names = {n for n, _ in model.named_parameters()}
    assert not [n for n in names if "input_layernorm" in n or "ln_1" in n]
    assert [n for n in names if "post_attention_layernorm" in n or "ln_2" in n]
    block, layout, kept = models.blocks(model)[0], lab.rows("plain"), []
    handle = block.register_forward_pre_hook(lambda m, args: kept.append(args[0]))
    x, _ = lab.observe(model, layout)
    handle.remove()
    np.testing.assert_array_equal(x, lab.array(kept[0]))


def test_scale_of_the_projections_does_not_matter(lab, family):
    model, layout = lab.apply("qkv-norm", lab.load(family), eps=1e-12), lab.rows("packed")
    with torch.no_grad():
        before = hidden_states(model, layout)
        for n, p in model.named_parameters():
            if any(n.endswith(f"{w}.{w}.{t}") for w in ("q_proj", "k_proj", "v_proj", "c_attn") for t in ("weight", "bias")):
                p *= 10
        after = hidden_states(model, layout)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)


def test_refuses_shared_and_later_norms(lab):
    sizes = dict(vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    phi = transformers.PhiForCausalLM(transformers.PhiConfig(**sizes))
    olmo2 = transformers.Olmo2ForCausalLM(transformers.Olmo2Config(**sizes))
    for model in (phi, olmo2, models.load("lab/bert-1m").model):
        before = {n for n, _ in model.named_modules()}
        with pytest.raises(UsageError, match="no norm before its attention"):
            lab.apply("qkv-norm", model)
        assert {n for n, _ in model.named_modules()} == before
