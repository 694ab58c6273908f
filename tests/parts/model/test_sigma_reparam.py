"""Oracle of model/sigma-reparam: the card's power iteration and its gradient in float64 numpy, and the exact spectral norm.

Bugs it is meant to catch: u and v exchanged for layers stored the other way round, several iterations a step, iterations
in evaluation or in recomputed blocks, sigma without gradient or with gradient through u and v, the bias scaled, the tied
embedding normalised, vectors missing in a checkpoint.
"""

import copy
import json
import shutil

import numpy as np
import pytest
import torch
from torch import nn

from metier.core import groups, models, part
from metier.core.errors import UsageError
from metier.testing import check_part

IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 3, 99, 42, 7, 1]])


def apply(model, **options):
    return part.build("model", {"sigma-reparam": options}).obj(model)


def spectral(layer):
    return layer.parametrizations.weight[0]


def layers(model):
    return {n: m for n, m in model.named_modules() if hasattr(m, "parametrizations")}


def test_contract():
    check_part("model/sigma-reparam")


@pytest.mark.parametrize("family", ["lab/llama-50k", "lab/gpt2-1m"])
def test_steps_against_numpy(family):
    """Forward values, one iteration a step, and the gradients of weight and gamma, while the weight changes."""
    model = apply(models.load(family, seed=1).model, warm=1).double().train()
    name, layer = list(layers(model).items())[1]
    part_ = spectral(layer)
    with torch.no_grad():
        part_.gamma.fill_(1.7)
    original = layer.parametrizations.weight.original
    u, v = part_.u.numpy().copy(), part_.v.numpy().copy()
    rng = np.random.default_rng(0)
    for _ in range(8):
        w, gamma = original.detach().numpy().copy(), part_.gamma.item()
        u = w @ v / np.linalg.norm(w @ v)
        v = w.T @ u / np.linalg.norm(w.T @ u)
        sigma = u @ w @ v
        upstream = rng.normal(size=w.shape)
        effective = layer.weight
        np.testing.assert_allclose(effective.detach().numpy(), gamma * w / sigma, rtol=1e-10, atol=1e-14)
        original.grad = part_.gamma.grad = None
        (effective * torch.from_numpy(upstream)).sum().backward()
        inner = (upstream * w).sum()
        np.testing.assert_allclose(
            original.grad.numpy(), gamma * (upstream / sigma - inner / sigma**2 * np.outer(u, v)), rtol=1e-9, atol=1e-12
        )
        np.testing.assert_allclose(part_.gamma.grad.item(), inner / sigma, rtol=1e-9)
        with torch.no_grad():
            original.add_(torch.from_numpy(0.05 * rng.normal(size=w.shape)))
    assert name


@pytest.mark.parametrize("family", ["lab/llama-50k", "lab/gpt2-1m"])
def test_the_spectral_norm_is_gamma(family):
    model = apply(models.load(family, seed=1).model, warm=1000)
    found = layers(model)
    assert len(found) == {"lab/llama-50k": 14, "lab/gpt2-1m": 16}[family]
    with torch.no_grad():
        for i, layer in enumerate(found.values()):
            spectral(layer).gamma.fill_(0.5 + i)
            exact = torch.linalg.svdvals(layer.weight.double())[0]
            assert float(exact) == pytest.approx(0.5 + i, rel=1e-3)


def test_start_at_the_norm_leaves_the_function():
    plain, ours = models.load("lab/gpt2-1m", seed=1).model.eval(), apply(models.load("lab/gpt2-1m", seed=1).model, gamma="norm")
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(input_ids=IDS).logits, plain(input_ids=IDS).logits, rtol=1e-4, atol=1e-5)


def test_embeddings_output_layer_and_biases_are_left_alone():
    model = apply(models.load("lab/gpt2-1m", seed=1).model)
    assert not any("wte" in n or "lm_head" in n for n in layers(model))
    assert model.lm_head.weight is model.transformer.wte.weight
    layer = models.blocks(model)[0].mlp.c_fc
    with torch.no_grad():
        layer.bias.fill_(3.0)
        assert torch.allclose(layer(torch.zeros(1, 128)), torch.full((1, 512), 3.0))
    roles = groups.roles(model)
    assert {roles[n] for n in roles if n.endswith("gamma")} == {"rest"}
    assert {roles[n] for n in roles if n.endswith("original")} == {"matrices"}


def vectors(model):
    return [spectral(m).u.clone() for m in layers(model).values()]


def changed(a, b):
    return [not torch.equal(x, y) for x, y in zip(a, b, strict=True)]


def test_one_iteration_for_each_change_of_the_weights():
    model = apply(models.load("lab/llama-50k", seed=1).model, warm=1)
    start = vectors(model)
    model.eval()(input_ids=IDS)
    assert not any(changed(start, vectors(model)))
    model.train()(input_ids=IDS)
    first = vectors(model)
    assert all(changed(start, first))
    model(input_ids=IDS)
    assert not any(changed(first, vectors(model)))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    model(input_ids=IDS)
    second = vectors(model)
    assert all(changed(first, second))
    for m in model.modules():  # an optimizer that writes behind autograd's back
        if isinstance(m, nn.Module) and hasattr(m, "after_step"):
            m.after_step()
    model(input_ids=IDS)
    assert all(changed(second, vectors(model)))


def test_recomputed_blocks_use_the_same_vectors():
    def gradients(recompute):
        model = apply(models.load("lab/llama-50k", seed=1).model, warm=1).train()
        torch.manual_seed(0)
        for m in layers(model).values():
            spectral(m).v.copy_(nn.functional.normalize(torch.linspace(-1, 1, len(spectral(m).v)), dim=0))
        if recompute:
            models.checkpoint_activations(model)
        for _ in range(2):
            loss = model(input_ids=IDS).logits.logsumexp(-1).sum()
            for m in layers(model).values():  # as if the weight were gathered again for the backward pass
                spectral(m).after_step()
            loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    once, twice = gradients(False), gradients(True)
    for name in once:
        torch.testing.assert_close(once[name], twice[name], rtol=1e-5, atol=1e-6)


def test_saved_read_and_copied(tmp_path):
    bundle = models.load("lab/llama-50k", seed=3)
    model = apply(bundle.model)
    model.config.metier_transforms = ["sigma-reparam"]
    model.train()(input_ids=IDS)
    models.save(models.replace_model(bundle, model), tmp_path / "m")
    again = models.load(str(tmp_path / "m")).model
    with torch.no_grad():
        want = model.eval()(input_ids=IDS).logits
        assert torch.equal(again.eval()(input_ids=IDS).logits, want)
        assert torch.equal(copy.deepcopy(model)(input_ids=IDS).logits, want)


def test_a_run_does_not_depend_on_its_micro_batches_and_resumes_exactly(tmp_path):
    from metier.core.api import train

    lines = [json.dumps({"text": f"the number {i} is not {i + 1}, " * (1 + i % 3)}) for i in range(60)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))

    def trained(name, **more):
        settings = {
            "model": "lab/llama-50k", "transform": ["sigma-reparam"], "data": {"train": str(tmp_path / "a.jsonl")},
            "optimizer": {"adamw": {"lr": 3e-3}}, "train": {"steps": 6, "batch": 4, "save_every": 3, **more},
        }  # fmt: skip
        train(settings, out=tmp_path / name, quiet=True, handle_signals=False)
        return models.load(str(tmp_path / name / "model")).model.state_dict()

    whole = trained("whole")
    split = trained("split", micro_batch=1, gradient_checkpointing=True)
    for name in whole:
        torch.testing.assert_close(split[name], whole[name], rtol=1e-4, atol=1e-5)
    for path in (tmp_path / "whole" / "checkpoints").glob("*06"):
        shutil.rmtree(path)
    again = trained("whole")
    assert all(torch.equal(again[n], whole[n]) for n in whole)


def test_bfloat16_weights():
    model = apply(models.load("lab/llama-50k", seed=3).model.to(torch.bfloat16), warm=500).train()
    layer = next(iter(layers(model).values()))
    assert layer.weight.dtype == torch.bfloat16
    assert spectral(layer).u.dtype == torch.float32
    assert torch.linalg.svdvals(layer.weight.float())[0].item() == pytest.approx(1, rel=5e-3)
    model(input_ids=IDS).logits.float().logsumexp(-1).sum().backward()


def test_refusals():
    model = apply(models.load("lab/llama-50k").model)
    with pytest.raises(UsageError, match="already"):
        apply(model)
