"""Oracle of model/fp4: one layer's forward and backward pass in float64 numpy, from the card's data paths; the layers around it.

Bugs it is meant to catch: a scale or outliers over the wrong dimension (above all in ``Conv1D``), a slope of the unscaled weight,
backward products with unrounded operands, a stopped gradient at clamped entries, a rest that is left out of the weight's
gradient, embeddings or the output layer rounded, a bias rounded, parameters renamed or untied, later tokens or other rows seen.
"""

import copy

import numpy as np
import pytest
import torch

from metier.core import groups, models, part
from metier.core.adapt import attach
from metier.core.errors import UsageError
from metier.core.forward import hidden_states
from metier.testing import check_part

IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 3, 99, 42, 7, 1]])
LEVELS = np.array([-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6])
LAYERS = {"lab/llama-50k": "mlp.down_proj", "lab/gpt2-1m": "mlp.c_fc", "lab/qwen2-1m": "self_attn.k_proj"}


def apply(model, **options):
    return part.build("model", {"fp4": options}).obj(model)


def load(name="lab/llama-50k", seed=1):
    return models.load(name, seed=seed).model


def rounded(x, axis, power_of_two=False):
    """``q(x)`` and its scale."""
    s = 6 / np.abs(x).max(axis=axis, keepdims=True)
    s = 2.0 ** np.floor(np.log2(s)) if power_of_two else s
    index = np.searchsorted((LEVELS[1:] + LEVELS[:-1]) / 2, x * s, side="right")
    return LEVELS[index] / s, s


def slope(x, k, cap):
    i = np.clip(np.searchsorted(LEVELS, x, side="right") - 1, 0, len(LEVELS) - 2)
    t = np.abs(2 * (x - LEVELS[i]) / (LEVELS[i + 1] - LEVELS[i]) - 1)
    return np.minimum(t ** (1 / k - 1) / k, cap)


def expected(w, b, x, up, o):
    """Output, and gradients of input, weight ``[out, in]`` and bias, for ``x [N, in]`` and upstream ``up [N, out]``."""
    xq, wq, f = x, w, 1.0
    if o["activations"] != "none":
        axis = 1 if o["quantile"] == "token" else None
        n = x.shape[1] if axis else x.size
        m = round((1 - o["alpha"]) * n) if o["activations"] != "direct" else 0
        order = np.sort(x, axis=axis)
        lo, hi = (order[:, [m]], order[:, [n - 1 - m]]) if axis else (order[m], order[n - 1 - m])
        c = np.clip(x, lo, hi)
        xq = rounded(c, 1 if o["act_group"] == "token" else None, o["power_of_two"])[0]
        xq = xq + (x - c) if o["activations"] == "occ" else xq
    if o["weights"] != "none":
        wq, s = rounded(w, 1 if o["weight_group"] == "channel" else None, o["power_of_two"])
        f = slope(w * s, o["k"], o["cap"]) if o["weights"] == "dge" else 1.0
    return xq @ wq.T + b, up @ wq, (up.T @ xq) * f, up.sum(0)


DEFAULTS = {
    "weights": "dge", "k": 5.0, "cap": 3.0, "activations": "occ", "alpha": 0.97, "quantile": "token", "act_group": "token",
    "weight_group": "channel", "power_of_two": False,
}  # fmt: skip
RECIPES = [
    {}, {"weights": "ste"}, {"weights": "none"}, {"activations": "clamp"}, {"activations": "direct"}, {"activations": "none"},
    {"k": 3.0, "cap": 1.5}, {"quantile": "tensor"}, {"act_group": "tensor", "weight_group": "tensor"}, {"power_of_two": True},
    {"weights": "ste", "activations": "direct", "act_group": "tensor", "weight_group": "tensor"}, {"alpha": 1.0},
]  # fmt: skip


def test_contract():
    check_part("model/fp4")


@pytest.mark.parametrize("change", RECIPES, ids=str)
@pytest.mark.parametrize("family", list(LAYERS))
def test_layer_against_numpy(family, change):
    options = {**DEFAULTS, **change}
    model = apply(load(family), **options).double()
    layer = models.blocks(model)[1].get_submodule(LAYERS[family])
    transposed = family == "lab/gpt2-1m"
    w = layer.weight.detach().numpy().T if transposed else layer.weight.detach().numpy()
    rng = np.random.default_rng(0)
    x, up = rng.normal(size=(2, 5, w.shape[1])), rng.normal(size=(2, 5, w.shape[0]))
    x[..., 3] *= 15
    bias = rng.normal(size=w.shape[0]) if layer.bias is not None else np.zeros(w.shape[0])
    if layer.bias is not None:
        with torch.no_grad():
            layer.bias.copy_(torch.from_numpy(bias))
    at = torch.from_numpy(x).requires_grad_()
    y = layer(at)
    (y * torch.from_numpy(up)).sum().backward()
    flat = (x.reshape(10, -1), up.reshape(10, -1))
    want = expected(w, bias, *flat, options)
    got = [y.detach(), at.grad, layer.weight.grad.T if transposed else layer.weight.grad]
    for g, e in zip(got, want, strict=False):
        np.testing.assert_allclose(g.numpy().reshape(e.shape), e, rtol=1e-9, atol=1e-11)
    if layer.bias is not None:
        np.testing.assert_allclose(layer.bias.grad.numpy(), want[3], rtol=1e-9)


def test_nothing_rounded_is_the_plain_model():
    model = load("lab/gpt2-1m").double().eval()
    with torch.no_grad():
        want = model(input_ids=IDS).logits
        torch.testing.assert_close(apply(model, weights="none", activations="none")(input_ids=IDS).logits, want)


def test_compensation_with_the_identity_for_rounding_is_the_plain_layer(monkeypatch):
    """Identity (4) of the card, for the product."""
    layer = models.blocks(apply(load("lab/qwen2-1m"), weights="none", alpha=0.9).double())[0].mlp.up_proj
    x = torch.randn(7, 128, dtype=torch.float64)
    assert not torch.allclose(layer(x), x @ layer.weight.T, rtol=1e-3)
    monkeypatch.setattr("metier.core.quantize.quantize", lambda x, dim, power_of_two=False: x)
    torch.testing.assert_close(layer(x), x @ layer.weight.T, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("family", ["lab/llama-50k", "lab/gpt2-1m"])
def test_what_is_left_alone(family):
    plain, model = load(family), apply(load(family))
    assert list(plain.state_dict()) == list(model.state_dict())
    assert groups.roles(plain) == groups.roles(model)
    changed = {n for n, m in model.named_modules() if hasattr(m, "fp4")}
    assert len(changed) == {"lab/llama-50k": 14, "lab/gpt2-1m": 16}[family]
    assert not any("lm_head" in n or "embed" in n or "wte" in n or "norm" in n for n in changed)
    assert all(isinstance(model.get_submodule(n), type(plain.get_submodule(n))) for n in changed)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight or family == "lab/llama-50k"


def test_skip():
    model = apply(load(), skip=["down_proj", "model.layers.0.*"])
    names = {n for n, m in model.named_modules() if hasattr(m, "fp4")}
    assert names == {f"model.layers.1.{n}" for n in (*(f"self_attn.{x}_proj" for x in "qkvo"), "mlp.gate_proj", "mlp.up_proj")}


def test_steps_move_the_very_parameters():
    model = load()
    before = list(model.parameters())
    apply(model)
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))
    model(input_ids=IDS).logits.logsumexp(-1).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in before)


@pytest.mark.parametrize("kind", ["plain", "packed"])
def test_packed_rows_and_padding(kind, lab):
    """A token's hidden state depends on its own group only: as in a row of its own."""
    model, layout = apply(lab.load("lab/qwen2-1m"), alpha=0.97), lab.rows(kind)
    want = copy.copy(layout)
    with torch.no_grad():
        got = hidden_states(model, layout)
        for r in range(layout.group.shape[0]):
            for g in range(1, int(layout.group[r].max()) + 1):
                at = ((layout.group[r] == g) & (layout.branch[r] == 0)).nonzero().flatten()
                alone = models.backbone(model)(input_ids=want.input_ids[r, at][None]).last_hidden_state
                torch.testing.assert_close(got[r, at], alone[0], rtol=1e-5, atol=1e-6)


def gradients(model, recompute=False, autocast=False):
    if recompute:
        models.checkpoint_activations(model)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = model.train()(input_ids=IDS).logits.float().logsumexp(-1).sum()
    loss.backward()
    return {n: p.grad for n, p in model.named_parameters()}


def test_recomputed_blocks():
    once, twice = gradients(apply(load(), alpha=0.9)), gradients(apply(load(), alpha=0.9), recompute=True)
    for name, g in once.items():
        assert torch.equal(g, twice[name]), name


def test_autocast_and_bfloat16():
    """Products in bfloat16 of what was rounded: weights stay in their type, gradients stay close."""
    plain = gradients(apply(load("lab/qwen2-1m"), activations="none"))
    mixed = gradients(apply(load("lab/qwen2-1m"), activations="none"), autocast=True)
    for name, g in plain.items():
        assert mixed[name].dtype == torch.float32
        assert torch.nn.functional.cosine_similarity(g.flatten(), mixed[name].flatten(), dim=0) > 0.99, name
    half = apply(load("lab/qwen2-1m").to(torch.bfloat16))
    assert all(g.dtype == torch.bfloat16 and g.isfinite().all() for g in gradients(half).values())
    gradients(apply(load("lab/qwen2-1m"), alpha=0.97), autocast=True)


def test_saved_as_plain_weights_and_read_with_fp4(tmp_path):
    bundle = models.load("lab/gpt2-1m", seed=3)
    weights = {n: t.clone() for n, t in bundle.model.state_dict().items()}
    model = apply(bundle.model, alpha=0.97)
    model.config.metier_transforms = [{"fp4": {"alpha": 0.97}}]
    models.save(models.replace_model(bundle, model), tmp_path / "m")
    again = models.load(str(tmp_path / "m")).model
    assert {type(m).__name__ for m in again.modules() if hasattr(m, "fp4")} == {"FP4Conv1D"}
    with torch.no_grad():
        want = model.eval()(input_ids=IDS).logits
        assert torch.equal(again.eval()(input_ids=IDS).logits, want)
        assert torch.equal(copy.deepcopy(model)(input_ids=IDS).logits, want)
    from transformers import AutoModelForCausalLM

    other = AutoModelForCausalLM.from_pretrained(tmp_path / "m").state_dict()
    assert all(torch.equal(other[n], t) for n, t in weights.items())


def test_adapters_come_on_top_and_merge_into_the_unrounded_weight():
    model = apply(load())
    layer = models.blocks(model)[0].mlp.up_proj
    weight, x = layer.weight.detach().clone(), torch.randn(3, 16)
    low = layer(x).detach()
    attached = attach(model, part.build("adapter", {"lora": {"rank": 2}}))
    adapter = attached.adapters["model.layers.0.mlp.up_proj"]
    assert adapter.base is layer
    with torch.no_grad():
        for p in adapter.parameters():
            if p.requires_grad:
                p.normal_()
        torch.testing.assert_close(adapter.off(x), low)
        delta = adapter.merged()[0] - weight
        torch.testing.assert_close(adapter(x), low + x @ delta.T)
        assert delta.abs().max() > 0
        torch.testing.assert_close(attached.merge().get_submodule("model.layers.0.mlp.up_proj").weight, weight + delta)


def test_beside_other_parts():
    for before, after in ((["qk-norm"], []), ([], ["qk-norm", "sigma-reparam"]), (["layer-scale"], [])):
        model = load()
        for name in before:
            model = part.build("model", name).obj(model)
        apply(model)
        for name in after:
            model = part.build("model", name).obj(model)
        assert sum(hasattr(m, "fp4") for m in model.modules()) == 14
        assert model(input_ids=IDS).logits.isfinite().all()


def test_refusals():
    with pytest.raises(UsageError, match="quantised already"):
        apply(apply(load()))
    with pytest.raises(UsageError, match="quantised already"):
        apply(apply(load("lab/gpt2-1m")))
    with pytest.raises(UsageError, match="reparametrised"):
        apply(part.build("model", "sigma-reparam").obj(load()))
    with pytest.raises(UsageError, match="down_proj"):
        apply(load(), skip=["down_prj"])
    with pytest.raises(UsageError, match="all-linear"):  # rather than an adapter that undoes the rounding
        attach(apply(load("lab/gpt2-1m")), part.build("adapter", "lora"))
    for wrong in ({"k": 0.5}, {"alpha": 0.5}, {"alpha": 1.1}, {"cap": 0.0}, {"activations": "sparse"}):
        with pytest.raises(UsageError):
            apply(load(), **wrong)
