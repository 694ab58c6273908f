"""Oracle of adapter/houlsby: the bottleneck in float64 NumPy, and its two places in the block."""

import numpy as np
import pytest
import torch
from scipy.special import erf
from torch import nn

from metier.core import part
from metier.core.adapt import attach
from metier.parts.adapter.houlsby import Houlsby
from metier.testing import check_part
from metier.testing.adapter import logits, put, tiny

F64 = {
    "relu": lambda z: np.maximum(z, 0),
    "gelu": lambda z: 0.5 * z * (1 + erf(z / np.sqrt(2))),
    "silu": lambda z: z / (1 + np.exp(-z)),
    "tanh": np.tanh,
}


def test_contract():
    check_part("adapter/houlsby")


@pytest.mark.parametrize("nonlinearity", list(F64))
def test_formula(nonlinearity):
    layer = Houlsby(nn.Linear(5, 6).double(), 6, bottleneck=3, nonlinearity=nonlinearity)
    for p in layer.parameters():
        nn.init.normal_(p)
    x = np.random.default_rng(0).normal(size=(4, 5))
    down, up, d, u, w, b = (
        t.detach().numpy() for t in (layer.down, layer.up, layer.down_bias, layer.up_bias, layer.base.weight, layer.base.bias)
    )
    h = x @ w.T + b
    expected = h + F64[nonlinearity](h @ down.T + d) @ up.T + u
    np.testing.assert_allclose(layer(torch.tensor(x)).detach().numpy(), expected, rtol=1e-12, atol=1e-12)


def test_start_is_truncated_and_near_the_identity():
    torch.manual_seed(0)
    layer = Houlsby(nn.Identity(), 200, bottleneck=50, std=0.01)
    for w in (layer.down, layer.up):
        assert 0.0195 < w.abs().max() <= 0.02
        assert abs(w.std().item() - 0.0088) < 3e-4  # a normal cut at two deviations has 0.88 of its deviation
    assert layer.down_bias.abs().max() == layer.up_bias.abs().max() == 0
    x = torch.randn(8, 200)
    assert 0 < (layer(x) - x).norm() / x.norm() < 0.05


def test_zero_std_starts_exactly_at_the_base():
    model = tiny()
    before = logits(model)
    attached = put(part.build("adapter", {"houlsby": {"std": 0.0}}), model)
    assert torch.equal(logits(attached.model), before)
    assert attached.adapters["model.layers.0.mlp"].down.abs().max() > 0


@pytest.mark.parametrize(
    ("family", "places"),
    [
        ("llama", [f"model.layers.{i}.{s}" for i in range(2) for s in ("self_attn", "mlp")]),
        ("gpt2", [f"transformer.h.{i}.{s}" for i in range(2) for s in ("attn", "mlp")]),
    ],
)
def test_places(family, places):
    assert list(put(part.build("adapter", "houlsby"), tiny(family)).adapters) == places


def test_bert_is_adapted_before_the_residual_sum():
    from transformers import BertConfig, BertForSequenceClassification

    model = BertForSequenceClassification(
        BertConfig(vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)
    )
    attached = attach(model, part.build("adapter", {"houlsby": {"layer_norms": False}}))
    assert list(attached.adapters) == [
        "bert.encoder.layer.0.attention.output.dense", "bert.encoder.layer.0.output.dense",
    ]  # fmt: skip
    assert set(attached.extra) == {"classifier.weight", "classifier.bias"}


@pytest.mark.parametrize(("family", "norms"), [("llama", 5), ("gpt2", 10)])
def test_layer_norms_train_on_request(family, norms):
    with_norms = put(part.build("adapter", {"houlsby": {"bottleneck": 4}}), tiny(family))
    without = put(part.build("adapter", {"houlsby": {"bottleneck": 4, "layer_norms": False}}), tiny(family))
    assert len(with_norms.extra) == norms
    assert without.extra == {}
    assert without.count == 2 * 2 * (32 * 4 * 2 + 32 + 4)
    assert with_norms.count == without.count + 32 * norms
