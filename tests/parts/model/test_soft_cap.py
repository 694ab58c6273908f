"""Oracle of model/soft-cap: attention in float64 numpy; plain attention in the limit; the identities of the card.

Bugs it is meant to catch: the cap after the mask (hidden positions are seen), on the scaled or unscaled product, without
its factor, lost by saving, a key-value cache or recomputation, or ignored because SDPA computes attention after all.
"""

import copy

import numpy as np
import pytest
import torch
import transformers

from metier.core import models
from metier.core.attention import observed
from metier.core.errors import UsageError
from metier.core.forward import hidden_states
from metier.testing import check_part

IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 3, 99, 42, 7, 1]])


def test_contract():
    check_part("model/soft-cap")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_against_numpy(lab, family, kind, attention):
    lab.check("soft-cap", family, kind, options={"cap": 0.7}, attention=attention, logits=lambda z: 0.7 * np.tanh(z / 0.7))


def test_a_wide_cap_is_plain_attention(lab, family, kind):
    layout, plain = lab.rows(kind), lab.load(family)
    capped = lab.apply("soft-cap", lab.load(family), cap=1e6)
    with torch.no_grad():
        torch.testing.assert_close(hidden_states(capped, layout), hidden_states(plain, layout), rtol=1e-5, atol=1e-5)


def test_hidden_positions_get_exactly_zero(lab, family, kind):
    """A cap of 0.01 makes every visible logit nearly equal, so anything that the mask lets through would show."""
    model, layout = lab.apply("soft-cap", lab.load(family), cap=0.01), lab.rows(kind)
    see, real = torch.from_numpy(lab.seen(layout))[:, None], (layout.group > 0)[:, None, :, None]
    found = []
    with observed(model, lambda s: found.append(next(iter(s.rows()))[2]), "x"), torch.no_grad():
        hidden_states(model, layout)
    assert len(found) == len(models.blocks(model))
    for p in found:
        assert (p[(real & ~see).expand_as(p)] == 0).all()
        assert (p[(real & see).expand_as(p)] > 0).all()


def test_no_logit_leaves_the_cap(lab):
    model = lab.apply("soft-cap", lab.load("lab/llama-50k"), cap=3.0)
    (cap,) = lab.attention_of(model).metier_attention.logits
    z = torch.linspace(-1e4, 1e4, 1001, dtype=torch.float64)
    assert cap(z).abs().max() <= 3.0
    assert torch.equal(cap(z), 3.0 * torch.tanh(z / 3.0))


def test_it_is_gemma2s_own_capping(lab):
    """transformers' Gemma 2 against the same attention with the part in place of its own cap."""
    config = transformers.Gemma2Config(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=8, attn_logit_softcapping=0.5, sliding_window=3,
        initializer_range=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    own = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    config = copy.deepcopy(config)
    config.attn_logit_softcapping = None
    ours = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    ours.load_state_dict(own.state_dict())
    with torch.no_grad():
        before = ours(input_ids=IDS).logits
        after = lab.apply("soft-cap", ours, cap=0.5)(input_ids=IDS).logits
        want = own(input_ids=IDS).logits
    torch.testing.assert_close(after, want, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(before, want, atol=1e-2)
    with pytest.raises(UsageError, match="already caps"):
        lab.apply("soft-cap", own)


def test_saved_and_read_again(lab, tmp_path):
    bundle = models.load("lab/llama-50k", seed=3)
    model = lab.apply("soft-cap", bundle.model, cap=0.05)
    model.config.metier_transforms = [{"soft-cap": {"cap": 0.05}}]
    models.save(models.replace_model(bundle, model), tmp_path / "m")
    again = models.load(str(tmp_path / "m")).model
    with torch.no_grad():
        assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)
        plain = models.load("lab/llama-50k", seed=3).model
        assert not torch.allclose(plain(input_ids=IDS).logits, model(input_ids=IDS).logits, atol=1e-6)


def test_gradients_with_checkpointing_are_the_same(lab):
    def gradients(recompute):
        model, layout = lab.apply("soft-cap", lab.load("lab/llama-50k"), cap=0.5).train(), lab.rows("packed")
        if recompute:
            models.checkpoint_activations(model)
        hidden_states(model, layout).square().sum().backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    once, twice = gradients(False), gradients(True)
    assert once.keys() == twice.keys()
    for name in once:
        torch.testing.assert_close(once[name], twice[name], rtol=1e-9, atol=1e-12)


def test_refuses_attention_without_the_interface(lab):
    neox = transformers.GPTNeoXConfig(
        vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(UsageError, match="no attention"):
        lab.apply("soft-cap", transformers.GPTNeoXForCausalLM(neox))
