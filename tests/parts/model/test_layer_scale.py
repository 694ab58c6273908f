"""Oracle of model/layer-scale: branch outputs in numpy; with a vector of zeros a block is the identity.

Bugs it is meant to catch: the residual stream scaled too, the bias of the layer left out, one branch forgotten, one
scalar instead of a vector, the vector not learnable.
"""

import numpy as np
import pytest
import torch
import transformers

from metier.core import groups, models
from metier.core.errors import UsageError
from metier.testing import check_part


def test_contract():
    check_part("model/layer-scale")


def outputs(model):
    block = models.blocks(model)[0]
    return [(block.self_attn, "o_proj"), (block.mlp, "down_proj")] if hasattr(block, "self_attn") else [
        (block.attn, "c_proj"), (block.mlp, "c_proj")
    ]  # fmt: skip


def test_outputs_against_numpy(lab, family):
    plain, model = lab.load(family), lab.apply("layer-scale", lab.load(family), init=0.25)
    rng = np.random.default_rng(0)
    for (before, name), (after, _) in zip(outputs(plain), outputs(model), strict=True):
        layer, scaled = getattr(before, name), getattr(after, name)
        assert lab.array(scaled.scale).tolist() == [0.25] * model.config.hidden_size
        vector = rng.normal(size=model.config.hidden_size)
        with torch.no_grad():
            scaled.scale.copy_(torch.from_numpy(vector))
            if layer.bias is not None:
                for each in (layer, scaled.layer):
                    each.bias.copy_(torch.linspace(-1, 1, len(each.bias)))
        weight = lab.array(layer.weight).T if isinstance(layer, torch.nn.Linear) else lab.array(layer.weight)
        x = rng.normal(size=(2, 3, weight.shape[0]))
        want = vector * (x @ weight + (0 if layer.bias is None else lab.array(layer.bias)))
        np.testing.assert_allclose(lab.array(scaled(torch.from_numpy(x))), want, rtol=1e-10, atol=1e-12)


def test_one_is_plain_and_zero_is_the_identity(lab, family):
    plain, ones = lab.load(family), lab.apply("layer-scale", lab.load(family), init=1.0)
    zeros = lab.apply("layer-scale", lab.load(family), init=0.0)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        assert torch.equal(plain(input_ids=ids).logits, ones(input_ids=ids).logits)
        states = zeros(input_ids=ids, output_hidden_states=True).hidden_states
        # the last one is behind the final norm
        assert all(torch.equal(a, states[0]) for a in states[1:-1])
        kept = []
        handle = models.blocks(zeros)[-1].register_forward_hook(lambda m, a, out: kept.append(out))
        zeros(input_ids=ids)
        handle.remove()
    assert torch.equal(kept[0], states[0])


def test_the_vectors_learn_without_decay(lab):
    model = lab.apply("layer-scale", lab.load("lab/llama-50k"))
    names = [n for n, _ in model.named_parameters() if n.endswith(".scale")]
    assert len(names) == 4
    assert {groups.roles(model)[n] for n in names} == {"rest"}
    model(input_ids=torch.tensor([[5, 6, 7]])).logits.logsumexp(-1).sum().backward()
    assert all(model.get_parameter(n).grad.abs().min() > 0 for n in names)


def test_refuses_blocks_with_a_norm_behind_the_branch():
    sizes = dict(
        vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
    )
    from metier.core import part

    with pytest.raises(UsageError, match="already normalises the outputs"):
        part.build("model", "layer-scale").obj(transformers.Olmo2ForCausalLM(transformers.Olmo2Config(**sizes)))
