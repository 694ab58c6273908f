"""Oracle of model/mup: transformers' Granite, which has the same multipliers in its config; sizes at several widths.

Bugs it is meant to catch: a branch scaled twice or after it is added, learned positions or the final norm left out,
1/√d_head kept, the width multiplier upside down, wrong matrices drawn small.
"""

import numpy as np
import pytest
import torch
import transformers

from metier.core import groups, models, part
from metier.core.errors import UsageError
from metier.testing import check_part

IDS = torch.randint(0, 500, (8, 64), generator=torch.Generator().manual_seed(1))


def apply(model, **options):
    return part.build("model", {"mup": options}).obj(model)


def llama(width, *, tied=False, layers=3, **more):
    torch.manual_seed(width)
    sizes = dict(
        vocab_size=500, hidden_size=width, intermediate_size=11 * width // 4, num_hidden_layers=layers,
        num_attention_heads=width // 16, num_key_value_heads=width // 32, max_position_embeddings=128,
        tie_word_embeddings=tied,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **more))


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits


def test_contract():
    check_part("model/mup")


def test_is_granite():
    """The released models' own architecture in transformers, with the same weights."""
    model = apply(llama(64), base=32, embedding=5.0, residual=0.3)
    c = model.config
    config = transformers.GraniteConfig(
        vocab_size=500, hidden_size=64, intermediate_size=176, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, rms_norm_eps=c.rms_norm_eps, tie_word_embeddings=False,
        embedding_multiplier=5.0, residual_multiplier=0.3, attention_multiplier=1 / 16, logits_scaling=2.0,
        rope_parameters=dict(c.rope_parameters),
    )  # fmt: skip
    granite = transformers.GraniteForCausalLM(config)
    granite.load_state_dict(model.state_dict(), strict=True)
    torch.testing.assert_close(logits(model), logits(granite), rtol=1e-4, atol=1e-5)


def test_gpt2_by_hand():
    """One block written out in float64."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=500, n_embd=32, n_layer=1, n_head=2, n_positions=64, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0
    )
    model = apply(transformers.GPT2LMHeadModel(config), base=16, embedding=3.0, residual=0.4).double().eval()
    w = {n: p.detach().numpy() for n, p in model.named_parameters()}
    b = "transformer.h.0."

    def norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * w[name + ".weight"] + w[name + ".bias"]

    def dense(x, name):
        return x @ w[b + name + ".weight"] + w[b + name + ".bias"]

    ids = IDS[0, :10].numpy()
    x = 3.0 * (w["transformer.wte.weight"][ids] + w["transformer.wpe.weight"][:10])
    q, k, v = np.split(dense(norm(x, b + "ln_1"), "attn.c_attn"), 3, axis=-1)
    heads = []
    for h in range(2):
        s = slice(16 * h, 16 * h + 16)
        z = q[:, s] @ k[:, s].T / 16 + np.triu(np.full((10, 10), -np.inf), 1)
        z = np.exp(z - z.max(-1, keepdims=True))
        heads.append(z / z.sum(-1, keepdims=True) @ v[:, s])
    x = x + 0.4 * dense(np.concatenate(heads, -1), "attn.c_proj")
    inner = dense(norm(x, b + "ln_2"), "mlp.c_fc")
    gelu = 0.5 * inner * (1 + np.tanh(np.sqrt(2 / np.pi) * (inner + 0.044715 * inner**3)))
    x = x + 0.4 * dense(gelu, "mlp.c_proj")
    expected = norm(x, "transformer.ln_f") @ w["transformer.wte.weight"].T / 2
    np.testing.assert_allclose(model(input_ids=IDS[:1, :10]).logits[0].detach().numpy(), expected, rtol=1e-9, atol=1e-9)


def sizes(model):
    """RMS of every residual branch and of the logits, and the mean logit of the token just read."""
    seen = []
    for block in models.blocks(model):
        for branch in (block.self_attn, block.mlp):
            branch.register_forward_hook(
                lambda m, a, o: seen.append((o[0] if isinstance(o, tuple) else o).square().mean().sqrt())
            )
    z = logits(model)
    return torch.stack(seen), float(z.square().mean().sqrt()), float(z.gather(-1, IDS.unsqueeze(-1)).mean())


@pytest.mark.parametrize("tied", [False, True])
def test_sizes_do_not_depend_on_the_width(tied):
    """Branches: not at all. Logits of random weights: as 1/√m; of the token just read, through a tied head: not at all."""
    found = {}
    for width in (64, 128, 256):
        runs = [sizes(apply(llama(width, tied=tied))) for _ in range(2)]
        found[width] = tuple(sum(r[i] for r in runs) / 2 for i in range(3))
    for width in (64, 128):
        torch.testing.assert_close(found[width][0], found[256][0], rtol=0.15, atol=0)
        assert found[width][1] * (width / 256) ** 0.5 == pytest.approx(found[256][1], rel=0.15)
        if tied:
            assert found[width][2] == pytest.approx(found[256][2], rel=0.15)


def test_without_it_branches_grow_with_the_width():
    plain = {width: sizes(llama(width, initializer_range=0.1))[0] for width in (64, 256)}
    assert (plain[256] > 2 * plain[64])[1::2].all()


def test_a_logit_of_aligned_states_does_not_depend_on_the_width():
    """States that agree with a row of the head, as training makes them, give the same logit at every width."""
    got = []
    for width in (64, 128, 256):
        model = apply(llama(width))
        rows = models.head(model).weight.detach()
        got.append(float(models.head(model)(model.model.norm(rows)).detach().diagonal().mean()))
    assert got == pytest.approx([25.6] * 3, rel=0.02)  # width 0.1² / 0.1 (states of size 1), divided by m


def test_weights_are_drawn_by_role():
    model = apply(llama(64), base=256, init_std=0.1)
    roles = groups.roles(model)
    spread = {n: float(p.detach().std()) for n, p in model.named_parameters() if p.ndim == 2}
    for name, value in spread.items():
        assert value == pytest.approx(0.2 if roles[name] == "matrices" else 0.1, rel=0.05), name
    assert all(float(p.detach().min()) == 1 for n, p in model.named_parameters() if p.ndim == 1)


def test_weights_can_be_kept():
    model = llama(64)
    before = {n: p.clone() for n, p in model.named_parameters()}
    apply(model, init_std=None)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_learning_rates_by_groups():
    """What the page tells the user to write gives lr/m to the matrices inside blocks and to nothing else."""
    model = apply(llama(64, tied=True))
    made = groups.split(
        model, lr=dict.fromkeys(groups.ROLES, 0.02), weight_decay=0.0, groups={"matrices": {"lr_scale": 1 / model.mup_width}}
    )
    rates = {n: g["lr"] for g in made for n, _ in g["params"]}
    assert rates.pop("model.embed_tokens.weight") == 0.02
    assert all(lr == (0.08 if "proj" in n else 0.02) for n, lr in rates.items())


def test_scores_of_the_core_are_those_of_the_model():
    """The core calls backbone and head on its own, in chunks."""
    from metier.core.scores import linear_logps

    model = apply(llama(64)).eval()
    with torch.no_grad():
        h = models.backbone(model)(input_ids=IDS[:1]).last_hidden_state[0, :-1]
        got = linear_logps(h, models.head(model), IDS[0, 1:], transform=models.logit_transform(model))
        z = model(input_ids=IDS[:1]).logits[0, :-1].log_softmax(-1)
    torch.testing.assert_close(got, z.gather(-1, IDS[0, 1:, None]).squeeze(-1), rtol=1e-4, atol=1e-4)


def test_an_adapter_keeps_its_branch_scaled():
    from metier.core import adapt

    model = apply(llama(64))
    before = logits(model)
    built = part.build("adapter", "lora")
    attached = adapt.attach(model, built, targets="o_proj")
    torch.testing.assert_close(logits(attached.model), before, rtol=1e-4, atol=1e-5)


def test_refusals():
    model = apply(llama(64))
    with pytest.raises(UsageError, match="already"):
        apply(model)
    with pytest.raises(UsageError, match="model family"):
        apply(models.load("lab/bert-1m").model)
    with pytest.raises(UsageError, match="gemma"):
        apply(models.load("lab/gemma-1m").model)
