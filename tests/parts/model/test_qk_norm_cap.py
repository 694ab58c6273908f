"""Oracle of model/qk-norm-cap: attention in float64 numpy, with gains and biases that are not at their start.

Bugs it is meant to catch: either half missing, norms after rotary positions, over all heads together, one norm for
queries and keys, the cap after the mask.
"""

import numpy as np
import pytest
import torch
import transformers

from metier.core import models
from metier.core.attention import observed
from metier.core.errors import UsageError
from metier.core.forward import hidden_states
from metier.testing import check_part


def test_contract():
    check_part("model/qk-norm-cap")


def test_against_numpy(lab, family, kind):
    rng = np.random.default_rng(1)
    size = 32 if family != "lab/llama-50k" else 8
    values = {n: rng.normal(1, 0.5, size) for n in ("q.weight", "q.bias", "k.weight", "k.bias")}

    def change(model):
        attention = lab.attention_of(model)
        q, k = (
            (attention.c_attn.norm, attention.c_attn.key_norm)
            if hasattr(attention, "c_attn")
            else (attention.q_proj.norm, attention.k_proj.norm)
        )
        for name, norm in (("q", q), ("k", k)):
            norm.weight.copy_(torch.from_numpy(values[f"{name}.weight"]))
            norm.bias.copy_(torch.from_numpy(values[f"{name}.bias"]))

    lab.check(
        "qk-norm-cap", family, kind, options={"cap": 0.8}, change=change,
        q=lambda x: lab.layer_norm(x, values["q.weight"], values["q.bias"]),
        k=lambda x: lab.layer_norm(x, values["k.weight"], values["k.bias"]),
        logits=lambda z: 0.8 * np.tanh(z / 0.8),
    )  # fmt: skip


def test_logits_are_bounded_and_the_scale_of_queries_does_not_matter(lab, family):
    model, layout = lab.apply("qk-norm-cap", lab.load(family), eps=1e-12), lab.rows("packed")
    largest = []
    watch = observed(model, lambda s: largest.append(max(float(z.abs().max()) for _, z, _, _ in s.rows())), "x")
    with watch, torch.no_grad():
        before = hidden_states(model, layout)
        for attention in (m for b in models.blocks(model) for m in b.modules() if hasattr(m, "metier_attention")):
            if hasattr(attention, "c_attn"):
                attention.c_attn.c_attn.weight[:, : model.config.hidden_size] *= 10
                attention.c_attn.c_attn.bias[: model.config.hidden_size] *= 10
            else:
                for p in attention.q_proj.q_proj.parameters():
                    p *= 10
        after = hidden_states(model, layout)
    size = 8 if family == "lab/llama-50k" else 32
    assert max(largest) <= size**0.5 * (1 + 1e-6)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)


def test_refusals(lab):
    model = lab.apply("qk-norm-cap", lab.load("lab/llama-50k"))
    with pytest.raises(UsageError, match="already"):
        lab.apply("qk-norm-cap", model)
    gemma2 = transformers.Gemma2Config(
        vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        head_dim=8,
    )  # fmt: skip
    with pytest.raises(UsageError, match="already caps"):
        lab.apply("qk-norm-cap", transformers.Gemma2ForCausalLM(gemma2))
