"""Oracle of model/mla: the equations in float64 numpy, and transformers' DeepSeek-V3 attention.

Bugs it is meant to catch: the scale without the rotary width, the norm over the rotary key too, rotary positions on the
wrong slice or not shared by the heads, keys and values of heads mixed up, an absorbed form that ignores the mask or the
causal order, a cache of expanded keys, attention that ignores packing.
"""

import numpy as np
import pytest
import torch
import transformers

from metier.core import models, part
from metier.core.data.collate import collate
from metier.core.data.encode import Item
from metier.core.errors import UsageError
from metier.core.forward import hidden_states
from metier.core.scores import token_logps
from metier.testing import check_part
from metier.testing._tiny import cached

SIZES = {"kv_lora_rank": 12, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5}
IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 4], [11, 3, 99, 42, 7, 1, 2]])


def load(name="lab/llama-50k", **options):
    torch.manual_seed(0)
    model = part.build("model", {"mla": {**SIZES, **options}}).obj(models.load(name).model)
    with torch.no_grad():
        for n, p in model.named_parameters():
            p.add_(0.3 * torch.randn_like(p)) if "self_attn" in n else None  # gains other than 1, scores that differ
    return model.double().eval()


def attention(model, i=0):
    return models.blocks(model)[i].self_attn


@torch.no_grad()
def logits(model, ids=IDS, **more):
    return model(input_ids=ids, **more).logits


def test_contract():
    check_part("model/mla")


# --- the equations ------------------------------------------------------------------------------------------


def rms(x, gain, eps):
    return gain * x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)


def turned(x, theta):
    """Rotary positions of ``x [T, d]``: pairs ``(j, j + d/2)`` turn by ``t theta^(-2j/d)``."""
    out, half = np.empty_like(x), x.shape[1] // 2
    for t in range(len(x)):
        for j in range(half):
            a = t * theta ** (-2 * j / x.shape[1])
            out[t, j] = x[t, j] * np.cos(a) - x[t, j + half] * np.sin(a)
            out[t, j + half] = x[t, j + half] * np.cos(a) + x[t, j] * np.sin(a)
    return out


def by_the_book(w, h, heads, s, theta, eps):
    """``h [T, D]`` of one sequence; ``w`` maps names to float64 arrays."""
    down = h @ w["kv_a_proj_with_mqa.weight"].T
    c = rms(down[:, : s["kv_lora_rank"]], w["kv_a_layernorm.weight"], eps)
    k_r = turned(down[:, s["kv_lora_rank"] :], theta)
    if "q_proj.weight" in w:
        q = h @ w["q_proj.weight"].T
    else:
        q = rms(h @ w["q_a_proj.weight"].T, w["q_a_layernorm.weight"], eps) @ w["q_b_proj.weight"].T
    n, r, v = s["qk_nope_head_dim"], s["qk_rope_head_dim"], s["v_head_dim"]
    out = []
    for i in range(heads):
        up = w["kv_b_proj.weight"][i * (n + v) : (i + 1) * (n + v)]
        keys, values = np.hstack([c @ up[:n].T, k_r]), c @ up[n:].T
        mine = q[:, i * (n + r) : (i + 1) * (n + r)]
        scores = np.hstack([mine[:, :n], turned(mine[:, n:], theta)]) @ keys.T / np.sqrt(n + r)
        scores[np.triu_indices(len(h), 1)] = -np.inf
        p = np.exp(scores - scores.max(1, keepdims=True))
        out.append(p / p.sum(1, keepdims=True) @ values)
    return np.hstack(out) @ w["o_proj.weight"].T


@pytest.mark.parametrize("absorb", ["always", "never"])
@pytest.mark.parametrize("q_rank", [None, 10])
def test_against_numpy(absorb, q_rank):
    model = load("lab/llama-300k", absorb=absorb, q_lora_rank=q_rank)
    one, config = attention(model), model.config
    h = torch.randn(1, 9, config.hidden_size, dtype=torch.float64)
    angles = models.backbone(model).rotary_emb(h, position_ids=torch.arange(9).unsqueeze(0))
    with torch.no_grad():
        got = one(hidden_states=h, position_embeddings=angles)[0][0].numpy()
    w = {n: t.numpy() for n, t in one.state_dict().items()}
    theta = config.rope_parameters["rope_theta"]
    expected = by_the_book(w, h[0].numpy(), config.num_attention_heads, SIZES, theta, config.rms_norm_eps)
    np.testing.assert_allclose(got, expected, atol=2e-6)  # the angles are computed in float32


@pytest.mark.parametrize("interleaved", [False, True])
def test_is_the_attention_of_deepseek_v3(interleaved):
    """Names and numbers; released weights interleave the rotary dimensions, which a permutation of rows undoes."""
    model = load("lab/llama-300k", q_lora_rank=10)
    config = transformers.DeepseekV3Config(
        hidden_size=64, num_attention_heads=4, num_key_value_heads=4, q_lora_rank=10, rope_interleave=interleaved,
        attention_bias=False, rope_theta=model.config.rope_parameters["rope_theta"], **SIZES,
    )  # fmt: skip
    config._attn_implementation = "eager"
    theirs = transformers.models.deepseek_v3.modeling_deepseek_v3.DeepseekV3Attention(config, 0).double().eval()
    state = {n: t.clone() for n, t in attention(model).state_dict().items()}
    if interleaved:
        order = torch.arange(4).view(2, 2).T.flatten()  # ours (0, 1, 2, 3) lie at theirs (0, 2, 1, 3)
        down, up = state["kv_a_proj_with_mqa.weight"], state["q_b_proj.weight"].view(4, 10, 10)
        down[12:] = down[12:][order]
        up[:, 6:] = up[:, 6:][:, order]
    theirs.load_state_dict(state, strict=True)
    for norm in (theirs.q_a_layernorm, theirs.kv_a_layernorm):
        norm.variance_epsilon = model.config.rms_norm_eps
        norm.forward = lambda x, n=norm: n.weight * x * (x.square().mean(-1, keepdim=True) + n.variance_epsilon).rsqrt()
    h = torch.randn(2, 9, 64, dtype=torch.float64)
    angles = models.backbone(model).rotary_emb(h, position_ids=torch.arange(9).unsqueeze(0))
    mask = torch.zeros(1, 1, 9, 9, dtype=torch.float64).masked_fill(torch.ones(9, 9).triu(1).bool(), -1e30)
    with torch.no_grad():
        expected = theirs(h, position_embeddings=angles, attention_mask=mask)[0]
        torch.testing.assert_close(
            attention(model)(hidden_states=h, position_embeddings=angles)[0], expected, atol=2e-6, rtol=1e-5
        )


def test_without_positions_and_compression_it_is_plain_attention():
    """d_r = 0 and an orthonormal W_UKV: heads attend by the rows of ``RMSNorm(W h)``, ``W = W_UKV W_DKV``."""
    width = 2 * (6 + 5)
    model = load(kv_lora_rank=width, qk_rope_head_dim=0)
    one = attention(model)
    with torch.no_grad():
        one.kv_b_proj.weight.copy_(torch.linalg.qr(torch.randn(width, width, dtype=torch.float64))[0])
        one.kv_a_layernorm.weight.fill_(1.0)
    h = torch.randn(2, 7, 16, dtype=torch.float64)
    joint = h @ (one.kv_b_proj.weight @ one.kv_a_proj_with_mqa.weight).T
    joint = joint * (joint.square().mean(-1, keepdim=True) + model.config.rms_norm_eps).rsqrt()
    k, v = joint.view(2, 7, 2, 11).transpose(1, 2).split([6, 5], dim=-1)
    q = (h @ one.q_proj.weight.T).view(2, 7, 2, 6).transpose(1, 2)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    expected = expected.transpose(1, 2).flatten(2) @ one.o_proj.weight.T
    torch.testing.assert_close(one(hidden_states=h, position_embeddings=None)[0], expected)
    order = torch.tensor([3, 1, 0, 2, 4, 5, 6])  # no positions: the last token sees a set
    last, same = (one(hidden_states=x, position_embeddings=None)[0][:, -1] for x in (h, h[:, order]))
    torch.testing.assert_close(last, same)


# --- cache and absorption -----------------------------------------------------------------------------------


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["lab/llama-300k", "lab/qwen2-1m", "lab/gemma-1m"])
def test_absorbed_and_expanded_agree(name, attn):
    model = load(name)
    model.set_attn_implementation(attn)
    model.to(torch.float64 if attn == "sdpa" else torch.float32)  # transformers' plain one has a softmax in float32
    padded = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    for more in ({}, {"attention_mask": padded, "position_ids": (padded.cumsum(1) - 1).clamp(min=0)}):
        found = []
        for absorb in ("always", "never"):
            for block in models.blocks(model):
                block.self_attn.absorb = absorb
            found.append(logits(model, **more)[:, 2:])
        near = 1e-9 if attn == "sdpa" else 2e-5
        torch.testing.assert_close(*found, atol=near, rtol=near)


@pytest.mark.parametrize("absorb", ["auto", "always", "never"])
def test_decoding_with_the_cache_is_the_whole_forward(absorb):
    model = load(absorb=absorb)
    whole, cache, found = logits(model), None, []
    for piece in IDS.split([3, 1, 1, 2], dim=1):
        with torch.no_grad():
            out = cached(model, piece, cache)
        cache, _ = out.past_key_values, found.append(out.logits)
    torch.testing.assert_close(torch.cat(found, 1), whole, atol=1e-6, rtol=1e-6)
    held = [t for layer in cache.layers for t in (layer.keys, layer.values)]
    assert [tuple(t.shape) for t in held[:2]] == [(2, 1, 7, 12), (2, 1, 7, 4)]
    assert sum(t.numel() for t in held) == IDS.numel() * model.config.num_hidden_layers * (12 + 4)


def test_auto_takes_the_cheaper_form():
    one = attention(load())
    assert one._absorbs(1, 100, True, None)
    assert not one._absorbs(100, 100, True, None)
    assert not one._absorbs(1, 100, False, None)
    one.train()
    assert not one._absorbs(1, 100, True, None)


def test_generate():
    model = load()
    model.generation_config.eos_token_id = None
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 3}
    plain, found = (model.generate(IDS, attention_mask=torch.ones_like(IDS), use_cache=c, **options) for c in (False, True))
    assert torch.equal(plain, found)
    ids = IDS
    for _ in range(8):
        ids = torch.cat([ids, logits(model, ids)[:, -1:].argmax(-1)], 1)
    assert torch.equal(found, ids)


def test_an_adapter_on_the_up_projection_is_not_bypassed():
    model = load(absorb="always")
    before = logits(model)
    one = attention(model)
    one.kv_b_proj.register_forward_hook(lambda m, a, out: 2 * out)
    assert not torch.allclose(before, logits(model))


# --- rows with several sequences, training, saving ---------------------------------------------------------


def rows(seed, *lengths):
    g = np.random.default_rng(seed)
    return [g.integers(5, 90, n).astype(np.int32) for n in lengths]


@pytest.mark.parametrize("absorb", ["always", "never"])
def test_packed_rows_and_shared_prompts(absorb):
    model = load(absorb=absorb)
    texts = [Item(t, np.ones(len(t), bool), id="x") for t in rows(0, 5, 7, 4)]
    whole = torch.cat([token_logps(model, collate([t], pad_id=3)) for t in texts])
    torch.testing.assert_close(token_logps(model, collate(texts, pad_id=3, rows=[[0, 1, 2]])), whole, atol=1e-7, rtol=1e-6)
    prompt, a, b = rows(1, 5, 3, 4)
    both = collate([Item(prompt, np.zeros(5, bool), (a, b), (np.ones(3, bool), np.ones(4, bool)), "x")], pad_id=3)
    joined = [Item(np.concatenate([prompt, x]), np.r_[np.zeros(5, bool), np.ones(len(x), bool)], id="x") for x in (a, b)]
    expected = torch.cat([token_logps(model, collate([i], pad_id=3)) for i in joined])
    torch.testing.assert_close(token_logps(model, both), expected, atol=2e-6, rtol=1e-5)


def test_checkpointing_changes_no_gradient():
    layout = collate([Item(t, np.ones(len(t), bool), id="x") for t in rows(0, 5, 7)], pad_id=3, rows=[[0, 1]])
    found = []
    for checkpointed in (False, True):
        model = load().train()
        if checkpointed:
            models.checkpoint_activations(model)
        hidden_states(model, layout).square().sum().backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert all(torch.equal(found[0][n], found[1][n]) for n in found[0])
    assert any("kv_a_proj_with_mqa" in n for n in found[0])


def test_a_run_trains_exports_and_loads(tmp_path):
    import metier
    from metier.core.export import export

    run = {"model": "lab/llama-50k", "data": {"train": "lab/markov", "limit": 40, "max_length": 512},
           "transform": [{"mla": SIZES}], "train": {"steps": 2, "batch": 4}}  # fmt: skip
    done = metier.train(run, out=tmp_path / "run", quiet=True)
    export(done.folder, tmp_path / "out")
    back = models.load(str(tmp_path / "out")).model.eval()
    assert attention(back).sizes == (6, 4, 5, 12, None)
    assert torch.equal(logits(back), logits(models.load(str(done.folder / "model")).model.eval()))


def test_refusals():
    for name, options, said in (
        ("lab/gpt2-1m", {}, "no full attention"),
        ("lab/llama-50k", {"qk_rope_head_dim": 3}, "must be even"),
    ):
        with pytest.raises(UsageError, match=said):
            part.build("model", {"mla": options}).obj(models.load(name).model)
    model = part.build("model", "qk-norm").obj(models.load("lab/llama-50k").model)
    with pytest.raises(UsageError, match="changed"):
        part.build("model", "mla").obj(model)
    config = models.load("lab/llama-50k").model.config
    config.rope_parameters = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 256}
    with pytest.raises(UsageError, match="temperature"):
        part.build("model", "mla").obj(transformers.AutoModelForCausalLM.from_config(config))
