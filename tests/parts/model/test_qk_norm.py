"""Oracle of model/qk-norm: Qwen3's own implementation, and the norm in numpy.

Bugs it is meant to catch: the norm after rotary positions, over the wrong dimension, on values, without its
gain, before the bias or before an adapter's output.
"""

import numpy as np
import pytest
import torch
import transformers

from metier.core import models, part
from metier.core.errors import UsageError
from metier.testing import check_part

IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 3, 99, 42, 7, 1]])


def apply(model, **options):
    return part.build("model", {"qk-norm": options}).obj(model)


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits


def test_contract():
    check_part("model/qk-norm")


def test_llama_with_it_is_qwen3():
    sizes = dict(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, rms_norm_eps=1e-6, attention_bias=False, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    qwen = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**sizes))
    llama = apply(
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, rope_theta=qwen.config.rope_parameters["rope_theta"]))
    )
    with torch.no_grad():
        for p in qwen.parameters():
            p.add_(0.1 * torch.randn_like(p))  # gains other than 1
    ours = {}
    for name, value in qwen.state_dict().items():
        for letter in "qk":
            name = name.replace(f"{letter}_proj.weight", f"{letter}_proj.{letter}_proj.weight").replace(
                f"{letter}_norm", f"{letter}_proj.norm"
            )
        ours[name] = value
    llama.load_state_dict(ours, strict=True)
    torch.testing.assert_close(logits(llama), logits(qwen), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["lab/gpt2-1m", "lab/bert-1m", "lab/qwen2-1m"])
@pytest.mark.parametrize("over", ["head", "projection"])
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_projections_against_numpy(name, over, norm):
    torch.manual_seed(0)
    plain, changed = (models.load(name, seed=0).model for _ in range(2))
    apply(changed, over=over, norm=norm)
    with torch.no_grad():
        for n, p in changed.named_parameters():
            if n.endswith(
                (
                    "_proj.norm.weight",
                    "query.norm.weight",
                    "key.norm.weight",
                    "c_attn.norm.weight",
                    "key_norm.weight",
                )
            ):
                p.mul_(1.5)
    x = torch.randn(2, 3, plain.config.hidden_size)
    for (path, before), after in zip(_attentions(plain), (m for _, m in _attentions(changed)), strict=True):
        head = getattr(before, "head_dim", None) or before.attention_head_size
        for part_name in ("c_attn", "q_proj", "k_proj", "query", "key"):
            if not hasattr(before, part_name):
                continue
            got = getattr(after, part_name)(x).detach().numpy()
            raw = getattr(before, part_name)(x).detach().double().numpy()
            pieces = np.split(raw, 3, axis=-1) if part_name == "c_attn" else [raw]
            size = head if over == "head" else pieces[0].shape[-1]
            expected = [piece if i == 2 else normed(piece, size, norm, 1.5) for i, piece in enumerate(pieces)]
            np.testing.assert_allclose(got, np.concatenate(expected, -1), rtol=2e-4, atol=2e-5, err_msg=f"{path}.{part_name}")


def normed(x, size, norm, gain):
    groups = x.reshape(*x.shape[:-1], -1, size)
    groups = groups - groups.mean(-1, keepdims=True) if norm == "layer" else groups
    return (gain * groups / np.sqrt((groups**2).mean(-1, keepdims=True) + 1e-6)).reshape(x.shape)


def _attentions(model):
    return [(n, m) for n, m in model.named_modules() if n.endswith((".self_attn", ".attn", "attention.self"))]


def test_scale_of_the_projection_no_longer_matters():
    model = apply(models.load("lab/llama-50k").model)
    before = logits(model)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if n.endswith(("q_proj.weight", "k_proj.weight")):
                p.mul_(100)
    torch.testing.assert_close(logits(model), before, rtol=1e-3, atol=1e-4)


def test_gains():
    each = apply(models.load("lab/llama-50k").model, gains="each")
    none = apply(models.load("lab/llama-50k").model, gains="none")
    shapes = {n: tuple(p.shape) for n, p in each.named_parameters() if ".norm." in n and "proj" in n}
    assert shapes["model.layers.0.self_attn.q_proj.norm.weight"] == (2, 8)
    assert shapes["model.layers.0.self_attn.k_proj.norm.weight"] == (1, 8)
    assert not [n for n, _ in none.named_parameters() if "proj.norm" in n]
    torch.testing.assert_close(logits(each), logits(none))


def test_an_adapter_comes_before_the_norm():
    from metier.core.targets import linear_targets

    model = apply(models.load("lab/llama-50k").model)
    targets = linear_targets(model, "q_proj")
    assert targets == [f"model.layers.{i}.self_attn.q_proj.q_proj" for i in range(2)]


def test_refusals():
    model = apply(models.load("lab/llama-50k").model)
    with pytest.raises(UsageError, match="already"):
        apply(model)
    with pytest.raises(UsageError, match="already"):
        apply(
            transformers.Qwen3ForCausalLM(
                transformers.Qwen3Config(
                    vocab_size=16,
                    hidden_size=16,
                    intermediate_size=16,
                    num_hidden_layers=1,
                    num_attention_heads=2,
                    num_key_value_heads=1,
                    head_dim=8,
                )
            )
        )
    neox = transformers.GPTNeoXConfig(
        vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(UsageError, match="no attention"):
        apply(transformers.GPTNeoXForCausalLM(neox))


def test_bfloat16_is_normalised_in_float32():
    model = apply(models.load("lab/llama-50k").model.to(torch.bfloat16))
    layer = models.blocks(model)[0].self_attn.q_proj
    x = torch.randn(64, 16, dtype=torch.bfloat16)
    out = layer(x)
    assert out.dtype == torch.bfloat16
    raw = layer.q_proj(x).double().detach().numpy()
    np.testing.assert_allclose(out.double().detach().numpy(), normed(raw, 8, "rms", 1.0), rtol=0.005)


def test_layer_norm_with_gain_and_bias(lab, family, kind):
    """The form of arXiv:2410.16682; at the start no logit exceeds the square root of the head's width."""
    from metier.core.attention import observed

    def change(model):
        for n, p in model.named_parameters():
            if n.startswith(f"{lab_block(model)}.") and "norm." in n and ("proj.norm" in n or "c_attn" in n):
                p.copy_(torch.linspace(-1, 2, len(p)))

    def lab_block(model):
        return next(n for n, m in model.named_modules() if m is models.blocks(model)[0])

    size = 8 if family == "lab/llama-50k" else 32
    vector = np.linspace(-1, 2, size)
    options = {"norm": "layer", "bias": True}
    lab.check(
        "qk-norm", family, kind, options=options, change=change,
        q=lambda x: lab.layer_norm(x, vector, vector), k=lambda x: lab.layer_norm(x, vector, vector),
    )  # fmt: skip
    model, largest = lab.apply("qk-norm", lab.load(family), **options), []
    with observed(model, lambda s: largest.append(max(float(z.abs().max()) for _, z, _, _ in s.rows())), "x"):
        logits(model)
    assert 0 < max(largest) <= size**0.5 * (1 + 1e-6)
