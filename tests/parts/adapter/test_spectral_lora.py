"""Oracle of adapter/spectral-lora: NumPy's singular vectors of gradients by autograd, and plain LoRA and PEFT on its files.

Bugs it is meant to catch: the gradient's sign, factors that are not balanced, a scale applied twice, compensation forgotten
in merge, files or checkpoints, data consumed by the calibration, a start made anew at a resume.
"""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from metier.core import api, basegrad, part
from metier.core.adapt import attach, load_adapter
from metier.core.engine import Engine
from metier.lab import loraflow
from metier.parts.adapter.lora import LoRA
from metier.parts.adapter.spectral_lora import SpectralLoRA
from metier.testing import check_part
from metier.testing._tiny import layouts
from metier.testing._tiny import tiny as tiny_run
from metier.testing.adapter import disturb, logits, put, tiny

RUN = {
    "model": "lab/llama-50k",
    "data": {"train": "lab/markov", "eval_fraction": 0.01, "eval_limit": 4, "max_length": 32, "chunk": True},
    "optimizer": {"adamw": {"lr": 1e-3}},
    "train": {"steps": 4, "batch": 2, "save_every": 2, "log_every": 1},
}


def test_contract():
    check_part("adapter/spectral-lora")


def started(seed=0, out=7, inputs=5, **options):
    g = torch.Generator().manual_seed(seed)
    layer = SpectralLoRA(nn.Linear(inputs, out).double(), **{"rank": 3, **options})
    gradient = torch.randn(out, inputs, generator=g, dtype=torch.float64)
    with torch.no_grad():
        for name, value in layer.start(gradient).items():
            layer.own_state()[name].copy_(value)
    return layer, gradient.numpy()


@pytest.mark.parametrize(("singular", "alpha", "s"), [("identity", None, 1.0), ("sqrt", 12.0, 4.0)])
def test_factors(singular, alpha, s):
    layer, gradient = started(singular=singular, alpha=alpha, start=0.3)
    u, sigma, vt = np.linalg.svd(-gradient)
    d = np.ones(3) if singular == "identity" else sigma[:3] / sigma[0]
    a, b = layer.down.detach().numpy(), layer.up.detach().numpy()
    np.testing.assert_allclose(s * b @ a, 0.09 * (u[:, :3] * d) @ vt[:3], atol=1e-12)
    np.testing.assert_allclose(b.T @ b, a @ a.T, atol=1e-12)
    np.testing.assert_allclose(np.diag(b.T @ b), 0.09 / s * d, atol=1e-12)
    assert (-gradient * (b @ a)).sum() > 0


def test_first_output_is_the_bases_bit_for_bit():
    layer, _ = started()
    x = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(layer(x), layer.base(x), rtol=0, atol=1e-15)
    torch.testing.assert_close(layer.merged()[0], layer.base.weight, rtol=0, atol=0)
    plain, _ = started(compensate=False)
    expected = plain.base(x).detach().numpy() + x.numpy() @ (plain.up @ plain.down).detach().numpy().T
    np.testing.assert_allclose(plain(x).detach().numpy(), expected, atol=1e-12)
    assert not plain.down0.any()


def test_formula_after_training():
    layer, _ = started(alpha=6.0)
    first = (layer.up @ layer.down).detach().numpy()
    with torch.no_grad():
        layer.up.add_(0.5), layer.down.mul_(-2)
    x = np.random.default_rng(0).normal(size=(4, 5))
    w, bias, b, a = (t.detach().numpy() for t in (layer.base.weight, layer.base.bias, layer.up, layer.down))
    expected = x @ (w + 2.0 * (b @ a - first)).T + bias
    np.testing.assert_allclose(layer(torch.tensor(x)).detach().numpy(), expected, atol=1e-12)
    np.testing.assert_allclose(layer.merged()[0].detach().numpy(), w + 2.0 * (b @ a - first), atol=1e-12)
    layer.enabled = False
    np.testing.assert_allclose(layer(torch.tensor(x)).detach().numpy(), x @ w.T + bias, atol=1e-12)


def test_more_rank_than_directions_and_no_gradient():
    layer, _ = started(rank=6)
    assert layer.up[:, :5].any(0).all()
    assert not layer.up[:, 5:].any()
    assert layer.down[5:].any()
    still = SpectralLoRA(nn.Linear(5, 7), rank=3)
    values = still.start(torch.zeros(7, 5))
    assert not values["up"].any()
    torch.testing.assert_close(values["down"], still.down.detach())


def test_gaussian_start():
    torch.manual_seed(0)
    layer = SpectralLoRA(nn.Linear(400, 300), rank=8, directions="gaussian", start=0.01)
    assert layer.calibration == 0
    for factor in (layer.up.T, layer.down):
        assert factor.norm(dim=1).mean().item() == pytest.approx(0.01, rel=0.05)
    x = torch.randn(3, 400)
    torch.testing.assert_close(layer(x), layer.base(x), rtol=0, atol=1e-6)


# --- the theory's identities ---------------------------------------------------------------------------------------


def test_balance_is_conserved_along_the_flow():
    """``BᵀB - A Aᵀ`` moves by O(step) in all; each factor itself moves a thousand times as much."""
    w2, w1, y = loraflow.problems(2, 45)
    first = loraflow.starts(w2, w1, y, 0.3, 4, False)
    *_, (loss, last) = loraflow.flow(w2, w1, y, first, 8.0)
    for k in (0, 2):
        before, after = (f[k].mT @ f[k] - f[k + 1] @ f[k + 1].mT for f in (first, last))
        assert np.abs(after - before).max() < 2 * loraflow.STEP
        assert np.abs(last[k] - first[k]).max() > 0.1
    assert (loss < 0.25).all()
    for b, a in (f[i : i + 2] for f in [loraflow.starts(w2, w1, y, 0.1, 4, True)] for i in (0, 2)):
        np.testing.assert_allclose(b.mT @ b, a @ a.mT, atol=1e-15)


def test_flow_is_the_gradients():
    """One step of the flow against autograd on the product of two adapted layers."""
    w2, w1, y = loraflow.problems(1)
    factors = loraflow.starts(w2, w1, y, 0.5, 3, False)
    (loss, _), (_, moved) = list(loraflow.flow(w2, w1, y, factors, 2 * loraflow.STEP))
    b1, a1, b2, a2 = leaves = [torch.tensor(f, requires_grad=True) for f in factors]
    off = torch.tensor(y) - (torch.tensor(w2) + b2 @ a2) @ (torch.tensor(w1) + b1 @ a1)
    expected = 0.5 * off.square().sum((1, 2))
    np.testing.assert_allclose(loss, expected.detach().numpy(), rtol=1e-12)
    for before, after, g in zip(factors, moved, torch.autograd.grad(expected.sum(), leaves), strict=True):
        np.testing.assert_allclose(after - before, -loraflow.STEP * g.numpy(), atol=1e-14)


def descend(layer, y, lr, steps):
    """Gradient descent of ``½ ‖Y - W - s (BA - B₀A₀)‖²`` by autograd through the part's merged weight."""
    target = torch.tensor(y, dtype=torch.float64)
    for _ in range(steps):
        loss = 0.5 * (target - layer.merged()[0]).square().sum()
        grads = torch.autograd.grad(loss, (layer.up, layer.down))
        with torch.no_grad():
            for p, g in zip((layer.up, layer.down), grads, strict=True):
                p.sub_(g, alpha=lr)
        yield


def test_one_layer_stays_in_the_residuals_subspace():
    """Residual of rank 2: started from its singular vectors, ``Uᵀ B A V`` stays diagonal and nothing leaves the subspace."""
    layer, _ = started(rank=2, compensate=False, start=0.05)
    g = np.random.default_rng(3)
    residual = g.normal(size=(7, 2)) @ g.normal(size=(2, 5))
    w = layer.base.weight.detach().numpy()
    with torch.no_grad():
        for name, value in layer.start(torch.tensor(-residual)).items():
            layer.own_state()[name].copy_(value)
    u, sigma, vt = np.linalg.svd(residual)
    for _ in descend(layer, w + residual, 1e-3, 4000):
        pass
    inside = u.T @ (layer.up @ layer.down).detach().numpy() @ vt.T
    np.testing.assert_allclose(np.diag(inside)[:2], sigma[:2], rtol=1e-3)
    np.testing.assert_allclose(np.triu(inside, 1), 0, atol=1e-12)
    np.testing.assert_allclose(np.tril(inside, -1), 0, atol=1e-12)


def test_scalar_case_in_closed_form():
    """``d(ab)/dt = (y - w - ab)(a² + b²)`` from a = b: ``ab`` is a logistic curve with rate 2 (y - w)."""
    layer, _ = started(out=1, inputs=1, rank=1, compensate=False, start=0.1)
    e = 1.5
    with torch.no_grad():
        for name, value in layer.start(torch.tensor([[-e]], dtype=torch.float64)).items():
            layer.own_state()[name].copy_(value)
    first = float((layer.up * layer.down).detach())
    assert first == pytest.approx(0.01)
    lr, y = 1e-4, layer.base.weight.detach().numpy() + e
    for t, _ in enumerate(descend(layer, y, lr, 20000), start=1):
        if t % 4000 == 0:
            expected = e / (1 + (e / first - 1) * math.exp(-2 * e * t * lr))
            assert float((layer.up * layer.down).detach()) == pytest.approx(expected, rel=2e-3)


# --- gradients at frozen weights -----------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointed", [False, True])
def test_base_gradients_are_autograds(checkpointed):
    run = tiny_run()
    model, data = run.context.model.double(), layouts(3, seed=4)
    if checkpointed:
        from metier.core.models import checkpoint_activations

        checkpoint_activations(model)
    model.train()
    total = sum(run.context.module(x)[0] for x in data)
    names, params = zip(*model.named_parameters(), strict=True)
    named = dict(zip(names, torch.autograd.grad(total, params, allow_unused=True), strict=True))
    attached = attach(model, part.build("adapter", {"spectral-lora": {"rank": 2}}))
    found = basegrad.base_gradients(run.context.module, attached.adapters, data, Engine(torch.device("cpu"), "fp32", "ddp"))
    assert len(found) == len(attached.adapters) > 5
    for name, got in found.items():
        np.testing.assert_allclose(got.numpy(), named[f"{name}.weight"].numpy(), rtol=1e-8, atol=1e-10)
    assert all(p.grad is None for p in model.parameters())
    assert not any(a.base._forward_hooks for a in attached.adapters.values())


def test_the_product_points_downhill():
    """A small step along it lowers the loss as the gradient says; the opposite direction raises it."""
    run = tiny_run()
    model, data = run.context.model.double().eval(), layouts(2, seed=5)
    attached = attach(model, part.build("adapter", {"spectral-lora": {"rank": 2, "compensate": False, "start": 1e-3}}))
    found = basegrad.base_gradients(run.context.module, attached.adapters, data, run.context.engine)

    def loss():
        with torch.no_grad():
            return float(sum(run.context.module(x)[0] for x in data))

    first, predicted = loss(), 0.0
    for name, adapter in attached.adapters.items():
        for key, value in adapter.start(found[name]).items():
            adapter.own_state()[key].data.copy_(value)
        predicted += float((found[name] * (adapter.up @ adapter.down).detach()).sum())
    assert predicted < 0
    assert loss() - first == pytest.approx(predicted, rel=0.02)


def test_top_singular_of_a_large_matrix():
    g = np.random.default_rng(0)
    u, v = (np.linalg.qr(g.normal(size=(n, 20)))[0] for n in (700, 600))
    m = (u * 0.5 ** np.arange(20)) @ v.T
    left, sigma, right = basegrad.top_singular(torch.tensor(m), 4)
    np.testing.assert_allclose(sigma.numpy(), 0.5 ** np.arange(4), rtol=1e-9)
    np.testing.assert_allclose(np.abs(np.diag(left.numpy().T @ u[:, :4])), 1, atol=1e-7)
    np.testing.assert_allclose(
        left.numpy() * sigma.numpy() @ right.numpy(), (u[:, :4] * 0.5 ** np.arange(4)) @ v[:, :4].T, atol=1e-7
    )


# --- runs and files ------------------------------------------------------------------------------------------------


def calibrated(family="llama", seed=0):
    attached = put(part.build("adapter", {"spectral-lora": {"rank": 2, "alpha": 6.0}}), tiny(family))
    g = torch.Generator().manual_seed(seed)
    for adapter in attached.adapters.values():
        gradient = torch.randn(adapter.base.weight.shape, generator=g)
        with torch.no_grad():
            for name, value in adapter.start(gradient).items():
                adapter.own_state()[name].copy_(value)
    return attached


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_files_are_a_plain_lora_of_twice_the_rank(tmp_path, family):
    attached = calibrated(family)
    disturb(attached)
    expected = logits(attached.model)
    attached.save(tmp_path)
    again = load_adapter(tiny(family), tmp_path)
    assert all(type(a) is LoRA and (a.rank, a.scale) == (4, 3.0) for a in again.adapters.values())
    torch.testing.assert_close(logits(again.model), expected, rtol=0, atol=2e-6)
    peft = pytest.importorskip("peft")
    theirs = peft.PeftModel.from_pretrained(tiny(family), str(tmp_path))
    torch.testing.assert_close(logits(theirs), expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(logits(attached.merge()), expected, rtol=0, atol=2e-5)


def spectral(**options):
    return {**RUN, "adapter": {"spectral-lora": {"rank": 2, "batches": 3, **options}}}


def test_start_of_a_run(tmp_path, monkeypatch):
    """Balanced, aligned with the gradient of the first three steps, and the data begin at their beginning."""
    taken = {}
    real = basegrad.base_gradients

    def watched(module, adapters, given, engine):
        found = real(module, adapters, given, engine)
        taken.update({n: (a, found[n].clone()) for n, a in adapters.items()})
        taken["ids"] = [i for x in given for i in x.ids]
        return found

    monkeypatch.setattr(basegrad, "base_gradients", watched)
    one = {**spectral(), "train": {**RUN["train"], "steps": 1}, "optimizer": {"sgd-momentum": {"lr": 1e-12}}}
    result = api.train(one, out=tmp_path / "a", quiet=True, handle_signals=False)
    assert len(taken.pop("ids")) == 6
    for adapter, gradient in taken.values():
        a, b = adapter.down.detach().double().numpy(), adapter.up.detach().double().numpy()
        np.testing.assert_allclose(b.T @ b, a @ a.T, atol=1e-6)
        u = np.linalg.svd(-gradient.double().numpy())[0][:, : b.shape[1]]
        np.testing.assert_allclose(np.linalg.norm(u.T @ b), np.linalg.norm(b), rtol=1e-4)
    plain = api.train(
        {**RUN, "train": one["train"], "optimizer": one["optimizer"], "adapter": {"lora": {"rank": 2}}},
        out=tmp_path / "b",
        quiet=True,
        handle_signals=False,
    )
    assert result.metrics["loss"] == pytest.approx(plain.metrics["loss"], abs=2e-6)


def test_resumed_run_is_the_same(tmp_path, monkeypatch):
    whole = api.train(spectral(), out=tmp_path / "whole", quiet=True, handle_signals=False)
    half = {**spectral(), "train": {**RUN["train"], "steps": 4, "max_seconds": 1e9}}
    calls = []
    monkeypatch.setattr(basegrad, "base_gradients", lambda *a, f=basegrad.base_gradients: calls.append(1) or f(*a))
    api.train(half, out=tmp_path / "half", quiet=True, handle_signals=False)
    import shutil

    shutil.rmtree(tmp_path / "half" / "checkpoints" / "step-00000004")
    (tmp_path / "half" / "adapter").rename(tmp_path / "half" / "gone")
    again = api.train(half, out=tmp_path / "half", quiet=True, handle_signals=False)
    assert len(calls) == 1
    assert again.metrics["eval_loss"] == whole.metrics["eval_loss"]
    files = [load_file(Path(r.folder) / "adapter" / "adapter_model.safetensors") for r in (whole, again)]
    assert all(torch.equal(files[0][k], files[1][k]) for k in files[0])
    assert any(k.endswith("lora_A.weight") and len(t) == 4 for k, t in files[0].items())


def test_needs_no_extra_parameters():
    plain, ours = LoRA(nn.Linear(6, 4), rank=2), SpectralLoRA(nn.Linear(6, 4), rank=2)
    count = [sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (plain, ours)]
    assert count[0] == count[1]
    assert math.isclose(ours.size, 0.1)
