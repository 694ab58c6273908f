"""Oracle of model/deepseek-moe: the equations in float64 numpy, token by token, and transformers' DeepSeek-V3 router.

Bugs it is meant to catch: gates that contain the bias, a softmax over the wrong experts, groups masked with 0, a gate on the
wrong expert's output, tokens put back in the wrong order, padding or recomputed blocks counted, the bias moved per
micro-batch or in the wrong direction, a bias in half precision or missing from checkpoints, sequences mixed up in the loss.
"""

import copy

import numpy as np
import pytest
import torch
import transformers

from metier.core import aux, models, part
from metier.core.data.collate import collate
from metier.core.data.encode import Item
from metier.core.errors import UsageError
from metier.core.forward import hidden_states
from metier.parts.model.deepseek_moe import DeepseekMoe, Experts, route, sequence_loss
from metier.testing import check_part

SMALL = {"n_routed": 8, "n_shared": 1, "top_k": 3, "n_group": 4, "topk_group": 2, "dense_first": 0, "scale": 2.5}


def load(name="lab/llama-50k", dtype=torch.float64, **options):
    torch.manual_seed(0)
    model = part.build("model", {"deepseek-moe": {**SMALL, **options}}).obj(models.load(name).model)
    for layer in layers(model):
        torch.nn.init.normal_(layer.gate.weight, std=0.5)
        layer.gate.e_score_correction_bias.normal_(std=0.1)
        torch.nn.init.normal_(layer.experts.get_submodule("0").gate_proj.weight, std=0.5)
    for p in model.parameters():
        p.data = p.data.to(dtype)
    return model


def layers(model):
    return [m for m in model.modules() if isinstance(m, Experts)]


def scored(n=50, experts=8, seed=0, **options):
    """Inputs of a router with biases, some of them so low that biased affinities are negative."""
    torch.manual_seed(seed)
    bias = torch.randn(experts, dtype=torch.float64) - 0.7
    o = DeepseekMoe(**{**SMALL, "n_routed": experts, **options})
    return torch.randn(n, 6, dtype=torch.float64), torch.randn(experts, 6, dtype=torch.float64), bias, o


def test_contract():
    check_part("model/deepseek-moe")


# --- routing ------------------------------------------------------------------------------------------------


def by_the_book(x, w, b, o):
    """Affinities, chosen experts and gates of one token."""
    s = 1 / (1 + np.exp(-(w @ x)))
    size = len(s) // o.n_group
    worth = [np.sort((s + b)[g * size : (g + 1) * size])[::-1][:2].sum() for g in range(o.n_group)]
    allowed = [i for g in np.argsort(worth)[::-1][: o.topk_group] for i in range(g * size, (g + 1) * size)]
    chosen = sorted(allowed, key=lambda i: -(s + b)[i])[: o.top_k]
    total = sum(s[i] for i in chosen)
    return s, {i: o.scale * s[i] / total for i in chosen}


@pytest.mark.parametrize("groups", [(1, 1), (4, 2), (8, 3), (2, 1)])
def test_router_against_numpy(groups):
    x, w, b, o = scored(n_group=groups[0], topk_group=groups[1])
    scores, chosen, gates = route(x, w, b, o)
    for t in range(len(x)):
        s, expected = by_the_book(x[t].numpy(), w.numpy(), b.numpy(), o)
        np.testing.assert_allclose(scores[t].numpy(), s, rtol=1e-12)
        assert set(chosen[t].tolist()) == set(expected)
        for i, g in zip(chosen[t].tolist(), gates[t].tolist(), strict=True):
            assert g == pytest.approx(expected[i], rel=1e-12)


def test_is_the_router_of_deepseek_v3():
    x, w, b, o = scored()
    config = transformers.DeepseekV3Config(
        hidden_size=6, n_routed_experts=8, num_experts_per_tok=3, n_group=4, topk_group=2, routed_scaling_factor=2.5
    )
    theirs = transformers.models.deepseek_v3.modeling_deepseek_v3.DeepseekV3TopkRouter(config)
    theirs.load_state_dict({"weight": w.float(), "e_score_correction_bias": b.float()})
    _, weights, indices = theirs(x.float())
    _, chosen, gates = route(x.float(), w.float(), b.float(), o)
    spread = torch.zeros(len(x), 8)
    torch.testing.assert_close(spread.scatter(1, chosen, gates), spread.scatter(1, indices, weights))


def test_every_expert_and_scale_one_gives_normalised_affinities():
    x, w, b, o = scored(top_k=8, n_group=1, topk_group=1, scale=1.0)
    scores, chosen, gates = route(x, w, b, o)
    torch.testing.assert_close(torch.zeros_like(scores).scatter(1, chosen, gates), scores / scores.sum(1, keepdim=True))


def test_a_bias_changes_the_choice_and_no_gate():
    x, w, b, o = scored(n_group=1, topk_group=1)
    scores, plain, _ = route(x, w, torch.zeros_like(b), o)
    _, chosen, gates = route(x, w, b, o)
    assert not torch.equal(plain.sort(1).values, chosen.sort(1).values)
    picked = scores.gather(1, chosen)
    torch.testing.assert_close(gates, 2.5 * picked / picked.sum(1, keepdim=True))
    for shifted in (b + 3.0, b - 3.0):  # below zero too: excluded groups are -inf, not 0
        x, w, b, o = scored()
        assert torch.equal(route(x, w, shifted, o)[1], route(x, w, b, o)[1])


def test_without_normalisation_gates_are_affinities():
    x, w, b, o = scored(norm_topk=False)
    scores, chosen, gates = route(x, w, b, o)
    torch.testing.assert_close(gates, 2.5 * scores.gather(1, chosen))


def test_the_order_of_experts_does_not_matter():
    x, w, b, o = scored(n_group=1, topk_group=1)
    order = torch.randperm(8)
    _, chosen, gates = route(x, w, b, o)
    _, moved, moved_gates = route(x, w[order], b[order], o)
    spread = torch.zeros(len(x), 8, dtype=torch.float64)
    assert torch.equal(spread.scatter(1, chosen, gates), spread.scatter(1, order[moved], moved_gates))


def test_gradient_reaches_the_router_through_chosen_gates_only():
    x, w, b, o = scored(n=1)
    w.requires_grad_()
    _, chosen, gates = route(x, w, b, o)
    gates[0, 0].backward()
    touched = set(w.grad.abs().sum(1).nonzero().flatten().tolist())
    assert touched == set(chosen[0].tolist())


def test_affinities_are_float32_in_half_precision():
    x, w, b, o = scored()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores, _, gates = route(x.bfloat16(), w.bfloat16(), b.float(), o)
    assert scores.dtype == gates.dtype == torch.float32
    expected = (x.bfloat16().float() @ w.bfloat16().float().T).sigmoid()
    torch.testing.assert_close(scores, expected)


# --- experts ------------------------------------------------------------------------------------------------


def silu(x):
    return x / (1 + np.exp(-x))


def ffn(w, name, x):
    up = silu(w[f"{name}.gate_proj.weight"] @ x) * (w[f"{name}.up_proj.weight"] @ x)
    return w[f"{name}.down_proj.weight"] @ up


def test_layer_against_numpy():
    layer = layers(load())[0].eval()
    w = {n: t.double().numpy() for n, t in layer.state_dict().items()}
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    got = layer(x).detach().numpy()
    for r in range(2):
        for t in range(7):
            token = x[r, t].numpy()
            _, gates = by_the_book(token, w["gate.weight"], w["gate.e_score_correction_bias"], layer.options)
            expected = ffn(w, "shared_experts", token) + sum(g * ffn(w, f"experts.{i}", token) for i, g in gates.items())
            np.testing.assert_allclose(got[r, t], expected, atol=1e-12)


def test_one_expert_is_a_dense_mlp():
    plain = models.load("lab/llama-50k").model
    one = load(n_routed=1, n_shared=0, top_k=1, n_group=1, topk_group=1, scale=1.0, dtype=torch.float32)
    for block, dense in zip(models.blocks(one), models.blocks(plain), strict=True):
        block.mlp.experts.get_submodule("0").load_state_dict(dense.mlp.state_dict())
    ids = torch.randint(0, 99, (2, 9))
    torch.testing.assert_close(one(input_ids=ids).logits, plain(input_ids=ids).logits)


def test_active_parameters_are_the_dense_ones():
    model = part.build("model", "deepseek-moe").obj(models.load("lab/llama-300k").model)
    dense, *routed = (b.mlp for b in models.blocks(model))
    assert not isinstance(dense, Experts)
    expert = sum(p.numel() for p in routed[0].experts.get_submodule("3").parameters())
    shared = sum(p.numel() for p in routed[0].shared_experts.parameters())
    assert 3 * expert + shared == sum(p.numel() for p in dense.parameters())
    assert len(models.blocks(model)) == 3


def test_experts_without_tokens_have_a_zero_gradient():
    layer = layers(load(top_k=1, topk_group=1))[0].train()
    layer(torch.randn(1, 2, 16, dtype=torch.float64)).sum().backward()
    grads = [p.grad for p in layer.experts.parameters()]
    assert all(g is not None for g in grads)
    assert sum(bool(g.abs().sum() > 0) for g in grads) <= 6


# --- balance ------------------------------------------------------------------------------------------------


def rows(seed, *lengths):
    g = np.random.default_rng(seed)
    return [Item(g.integers(5, 90, n).astype(np.int32), np.ones(n, bool), id="x") for n in lengths]


def forward(model, layout):
    with aux.collect(layout) as found:
        return hidden_states(model, layout), found


def test_loads_of_real_tokens_over_the_whole_step():
    model = load().train()
    chosen = []
    for layer in layers(model):
        layer.gate.e_score_correction_bias.zero_()
    for layout in (collate(rows(0, 5, 9), pad_id=3), collate(rows(1, 4, 6), pad_id=3, rows=[[0, 1]])):
        forward(model, layout)
        with torch.no_grad():  # what the router chose, from the layer's own input
            seen = []
            hook = layers(model)[0].register_forward_pre_hook(lambda m, a, s=seen: s.append(a[0]))
            model.eval()
            hidden_states(model, layout)
            model.train()
            hook.remove()
        layer = layers(model)[0]
        picked = route(seen[0].flatten(0, 1), layer.gate.weight, layer.gate.e_score_correction_bias, layer.options)[1]
        chosen.append(picked[layout.group.flatten() > 0].flatten())
    load_ = np.bincount(torch.cat(chosen).numpy(), minlength=8)
    assert load_.sum() == (5 + 9 + 4 + 6) * 3
    assert layers(model)[0].load.tolist() == load_.tolist()
    layers(model)[0].after_step()
    np.testing.assert_allclose(
        layers(model)[0].gate.e_score_correction_bias.numpy(), 1e-3 * np.sign(load_.mean() - load_), rtol=1e-6
    )
    assert float(layers(model)[0].violation) == pytest.approx(load_.max() / load_.mean() - 1)
    assert not layers(model)[0].load.any()


def test_nothing_else_is_counted():
    layout = collate(rows(0, 5, 9), pad_id=3)
    model = load().eval()
    forward(model, layout)
    with torch.no_grad():
        hidden_states(model.train(), layout)  # labels are drawn like this
    forward(model, copy.copy(layout).__class__(**{**layout.__dict__, "filler": True}))
    assert not any(m.load.any() for m in layers(model))
    hidden_states(model, layout).sum().backward()  # somebody else's loop
    assert [int(m.load.sum()) for m in layers(model)] == [18 * 3] * 2


def test_equal_loads_leave_the_bias_alone():
    layer = layers(load())[0]
    before = layer.gate.e_score_correction_bias.clone()
    layer.load.fill_(7)
    layer.after_step()
    assert torch.equal(layer.gate.e_score_correction_bias, before)
    layer.load.copy_(torch.tensor([9, 7, 7, 7, 7, 7, 7, 5]))
    layer.after_step()
    moved = layer.gate.e_score_correction_bias - before
    np.testing.assert_allclose(moved.numpy(), [-1e-3, 0, 0, 0, 0, 0, 0, 1e-3], atol=1e-7)


def test_loads_of_all_processes_count(monkeypatch):
    """Here expert 0 has more than its share, over both processes less."""
    layer = layers(load())[0]
    before = layer.gate.e_score_correction_bias.clone()
    layer.load.copy_(torch.tensor([9, 5, 5, 5, 5, 5, 5, 5]))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda t: t.add_(torch.tensor([0, 9, 9, 9, 9, 9, 9, 9])))
    layer.after_step()
    moved = layer.gate.e_score_correction_bias - before
    np.testing.assert_allclose(moved.numpy(), [1e-3, *[-1e-3] * 7], atol=1e-7)


def test_a_frozen_router_and_other_balances_keep_the_bias():
    for model in (load(balance="none"), load(balance="auxiliary"), load().requires_grad_(False)):
        layer = layers(model)[0]
        before = layer.gate.e_score_correction_bias.clone()
        layer.load[0] = 5
        layer.after_step()
        assert torch.equal(layer.gate.e_score_correction_bias, before)


def test_with_frozen_inputs_the_bias_ends_in_a_cycle_of_its_step():
    torch.manual_seed(0)
    layer = layers(load(n_group=1, topk_group=1, speed=1e-3))[0].train()
    x = torch.randn(1, 512, 16, dtype=torch.float64)
    seen, violations = [], []
    for step in range(1500):
        with torch.enable_grad():
            layer._observe(*route(x[0], layer.gate.weight, layer.gate.e_score_correction_bias, layer.options)[:2], x.shape[:2])
        layer.after_step()
        violations.append(float(layer.violation))
        if step >= 1000:
            seen.append(layer.gate.e_score_correction_bias.clone())
    spread = torch.stack(seen).amax(0) - torch.stack(seen).amin(0)
    assert float(spread.max()) < 2.1e-3  # up and down by one step; a drift over these 500 would be 0.5
    assert violations[0] > 0.3
    assert np.mean(violations[-100:]) < 0.05


def test_checkpointing_counts_once_and_changes_no_gradient():
    layout = collate(rows(0, 5, 9), pad_id=3)
    found = []
    for checkpointed in (False, True):
        model = load(alpha=0.5).train()
        if checkpointed:
            models.checkpoint_activations(model)
        h, extra = forward(model, layout)
        (h.square().mean() + extra["balance"]).backward()
        assert [int(m.load.sum()) for m in layers(model)] == [14 * 3] * 2
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert any("gate.weight" in n for n in found[0])
    assert all(torch.equal(found[0][n], found[1][n]) for n in found[0])


def test_sequence_loss_against_numpy():
    torch.manual_seed(0)
    group = torch.tensor([[1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 0, 0]])
    scores, chosen = torch.rand(12, 5, dtype=torch.float64), torch.stack([torch.randperm(5)[:2] for _ in range(12)])
    losses = []
    for r, g in ((0, 1), (0, 2), (1, 1)):
        at = [r * 6 + t for t in range(6) if group[r, t] == g]
        f = np.array([5 / (2 * len(at)) * sum(i in chosen[t].tolist() for t in at) for i in range(5)])
        p = np.mean([scores[t].numpy() / scores[t].numpy().sum() for t in at], axis=0)
        losses.append((f * p).sum())
    assert float(sequence_loss(scores, chosen, group)) == pytest.approx(np.mean(losses), rel=1e-12)
    even = torch.full((10, 5), 0.3), torch.tensor([[0, 1], [2, 3], [4, 0], [1, 2], [3, 4]] * 2)
    assert float(sequence_loss(*even, torch.ones(1, 10))) == pytest.approx(1.0)


def test_the_loss_is_added_with_its_weight():
    layout = collate(rows(0, 5, 9), pad_id=3)
    with_, without = (forward(load(alpha=a).train(), layout)[1] for a in (0.25, 0.0))
    assert "balance" not in without
    assert 0.25 * 2 * 0.9 < float(with_["balance"].detach()) < 0.25 * 2 * 3


# --- runs ---------------------------------------------------------------------------------------------------


def run_file(**more):
    return {"model": "lab/llama-50k", "data": {"train": "lab/markov", "limit": 40, "max_length": 512},
            "transform": [{"deepseek-moe": {**SMALL, "speed": 0.01}}], "schedule": "constant", "train": {"steps": 4, "batch": 4, **more}}  # fmt: skip


def test_a_run_balances_resumes_exports_and_loads(tmp_path):
    import metier
    from metier.core.export import export

    done = metier.train(run_file(), out=tmp_path / "whole", quiet=True)
    steps = [e for e in done.events if e["event"] == "step"]
    assert all(e["max_violation"] > 0 and e["balance"] > 0 for e in steps)
    metier.train(run_file(steps=2, micro_batch=2), out=tmp_path / "split", quiet=True)
    split = metier.train(run_file(micro_batch=2, gradient_checkpointing=True), out=tmp_path / "split", quiet=True)
    assert split.step == 4
    assert [e["step"] for e in split.events if e["event"] == "step"] == [1, 2, 3, 4]
    export(done.folder, tmp_path / "out")
    biases = []
    for folder in (done.folder / "model", tmp_path / "out", split.folder / "model"):
        model = models.load(str(folder)).model
        biases.append(torch.stack([m.gate.e_score_correction_bias for m in layers(model)]))
    assert torch.equal(biases[0], biases[1])
    assert torch.equal(biases[0], biases[2])  # neither splitting a step nor resuming matters
    assert 0 < biases[0].abs().max() < 0.041


def test_weights_in_half_precision_leave_the_bias_wide():
    torch.manual_seed(0)
    model = DeepseekMoe(**SMALL)(models.load("lab/llama-50k", dtype=torch.bfloat16).model)
    layer = layers(model)[0]
    assert layer.gate.weight.dtype == torch.bfloat16
    assert layer.gate.e_score_correction_bias.dtype == torch.float32
    assert torch.isfinite(model(input_ids=torch.randint(0, 99, (2, 9))).logits).all()
    assert {n.split("mlp.")[1] for n in model.state_dict() if "gate." in n or "load" in n} == {
        "gate.weight", "gate.e_score_correction_bias"
    }  # fmt: skip


def test_refusals():
    for options in ({"n_routed": 9, "n_group": 2}, {"topk_group": 2}, {"n_routed": 8, "n_group": 4, "topk_group": 1, "top_k": 3}):
        with pytest.raises(UsageError, match="experts in"):
            part.build("model", {"deepseek-moe": options})
    for name, options in (("lab/gpt2-1m", {}), ("lab/bert-1m", {}), ("lab/llama-50k", {"dense_first": 2})):
        with pytest.raises(UsageError, match="no gated MLPs"):
            part.build("model", {"deepseek-moe": options}).obj(models.load(name).model)
