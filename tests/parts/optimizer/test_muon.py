"""Oracle of optimizer/muon: momentum and Newton-Schulz in NumPy, singular values, and torch's Muon."""

import math

import numpy as np
import pytest
import torch

import metier.optimizers
from metier.core import part
from metier.core.optim import Optimizer, Step

SHAPES = [(4, 6), (6, 4), (5, 5)]


def newton_schulz(x, steps=5):
    x = x / (np.sqrt((x**2).sum()))
    for _ in range(steps):
        u, s, vt = np.linalg.svd(x, full_matrices=False)
        x = (u * (3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5)) @ vt
    return x


def formula(course, lr, wd, beta, nesterov, scale):
    p, m, out = course.start.copy(), 0.0, []
    rows, cols = p.shape
    factor = math.sqrt(max(1, rows / cols)) if scale == "spectral" else 0.2 * math.sqrt(max(rows, cols))
    for g in course.grads:
        m = beta * m + (1 - beta) * g
        x = beta * m + (1 - beta) * g if nesterov else m
        p = p * (1 - lr * wd) - lr * factor * newton_schulz(x)
        out.append(p)
    return np.stack(out)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("nesterov", "scale"), [(True, "spectral"), (True, "rms"), (False, "rms")])
def test_formula(make_course, shape, nesterov, scale):
    """The iteration acts on singular values alone, so its NumPy transcription works on those."""
    course = make_course(shape)
    got = course.run("muon", nesterov=nesterov, scale=scale)
    np.testing.assert_allclose(got, formula(course, 0.03, 0.1, 0.95, nesterov, scale), rtol=1e-7, atol=1e-9)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
@pytest.mark.parametrize("shape", [(40, 60), (60, 40)], ids=str)
@pytest.mark.parametrize(("scale", "theirs"), [("spectral", "original"), ("rms", "match_rms_adamw")])
def test_as_torch(make_course, shape, scale, theirs):
    """torch iterates in bfloat16, so both do here; entries agree to its rounding."""
    course = make_course(shape)
    got = course.run("muon", scale=scale, precision="bf16", dtype=torch.float32)
    wanted = course.follow(lambda p: torch.optim.Muon([p], lr=0.03, weight_decay=0.1, adjust_lr_fn=theirs), torch.float32)
    size = np.abs(wanted[-1] - course.start).mean()
    assert np.abs(got - wanted).max() < 0.1 * size
    assert np.abs(got - wanted).mean() < 0.01 * size


def test_singular_values_of_a_direction_are_near_one():
    from metier.core.linalg import orthogonalize

    x = torch.randn(3, 40, 60, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalize(x, 5))
    assert values.shape == (3, 40)
    assert ((values > 0.6) & (values < 1.25)).all()


def test_entries_of_rms_scaling_are_as_large_as_adamws():
    """0.2, the typical size of AdamW's update, whatever the shape (Liu et al., section 2.2)."""
    rule = part.build("optimizer", "muon").obj
    for shape in ((64, 64), (64, 256), (256, 64)):
        g = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
        direction = rule.update(g, g, {"m": torch.zeros_like(g)}, Step(t=1, lr=1.0))
        assert 0.15 < direction.square().mean().sqrt() < 0.25


def test_stacked_is_one_by_one():
    """Seven matrices of two shapes in one step, against one optimizer each."""
    source = torch.Generator().manual_seed(0)
    starts = [torch.randn(s, generator=source) for s in [(4, 6)] * 4 + [(6, 4)] * 3]
    rule = part.build("optimizer", "muon").obj
    together = [torch.nn.Parameter(s.clone()) for s in starts]
    alone = [torch.nn.Parameter(s.clone()) for s in starts]
    optimizers = [Optimizer(together, rule, lr=0.1), *(Optimizer([p], rule, lr=0.1) for p in alone)]
    for _ in range(5):
        for p, q in zip(together, alone, strict=True):
            p.grad = torch.randn(p.shape, generator=source)
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(together, alone)


def test_only_hidden_matrices_are_orthogonalized():
    model = torch.nn.Sequential(torch.nn.Embedding(9, 6), torch.nn.Linear(6, 6))
    optimizer = metier.optimizers.Muon(model, lr=1e-3, scale="spectral")
    settings = {n: (g["role"], g["lr"]) for g in optimizer.param_groups for n in g["param_names"]}
    assert settings["1.weight"] == ("matrices", 1e-3)
    assert settings["0.weight"] == ("embeddings", pytest.approx(1e-3 * 3e-4 / 0.02))
    assert settings["1.bias"] == ("rest", pytest.approx(1e-3 * 3e-4 / 0.02))
