"""Oracle of optimizer/dion: NumPy with LAPACK's QR, the authors' two codes, and the identities of the method."""

import math

import numpy as np
import pytest
import torch

import metier.optimizers
from metier.core import part
from metier.core.linalg import gaussian, orthonormal, power_factors
from metier.core.optim import Optimizer, Step

QR = ["householder", "cholesky", "randomized"]

AUTHORS = {
    ("simple", (6, 4), 1.0, 1): (
        [2.02448392, -2.57391787, 0.33215830, -0.50975925], [0.08382213, 1.52642465, 0.47405112, -0.46218753]),
    ("simple", (6, 4), 0.5, 1): (
        [2.03374958, -2.56365323, 0.40240192, -0.55455935], [0.07833993, 1.52773225, 0.52021992, -0.49111882]),
    ("reference", (6, 4), 0.5, 2): (
        [2.02973628, -2.57142258, 0.38511270, -0.54507399], [0.07849799, 1.51977372, 0.50947106, -0.48105174]),
    ("reference", (4, 6), 0.5, 1): (
        [2.01441121, -2.55302215, 0.39086843, -0.56702012, -0.45758358, -0.23236778],
        [0.96868360, -0.17295778, 0.06729949, 1.53115642, 0.50635576, -0.49339765]),
    ("reference", (4, 6), 1.0, 2): (
        [2.02807188, -2.59612894, 0.37934580, -0.52945948, -0.49402303, -0.24020866],
        [0.96177930, -0.18816350, 0.07392235, 1.53027189, 0.48805717, -0.48152071]),
}  # fmt: skip
"""(code, shape, rank fraction, iterations): first and last row after six steps of lr 0.02, weight decay 0.01, in float32:
microsoft/dion 0a059a4, dion/dion_{simple,reference}.py without torch.compile, ``qr_method="qr"``, Q set to the numbers below.
"""


def dion(**options):
    return part.build("optimizer", {"dion": options}).obj


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def formula(course, q, *, lr=0.03, wd=0.1, mu=0.95, iterations=1, feedback=True):
    """The card's seven lines; the transpose of everything when there are fewer rows than columns."""
    x, m = course.start.copy(), 0.0
    wide = x.shape[0] < x.shape[1]
    factor, out = math.sqrt(x.shape[0] / x.shape[1]), []
    for g in course.grads:
        b = m + (g.T if wide else g)
        for i in range(iterations):
            p, _ = np.linalg.qr(b @ (q if i == 0 else r))  # noqa: F821
            r = b.T @ p
        m = b - (1 - mu) * p @ r.T if feedback else mu * b
        q = r / (np.sqrt((r**2).sum(0)) + 1e-8)
        d = p @ q.T
        x = (1 - lr * wd) * x - lr * factor * (d.T if wide else d)
        out.append(x)
    return np.stack(out)


@pytest.mark.parametrize("shape", [(9, 6), (6, 9), (5, 5)], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"rank_fraction": 0.5}, {"rank_fraction": 0.5, "power_iters": 3}, {"rank_fraction": 0.25, "error_feedback": False}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("qr", QR)
def test_formula(make_course, shape, options, qr):
    course = make_course(shape)
    rule = dion(qr=qr, **options)
    q = rule.init(torch.zeros(shape, dtype=torch.float64))["q"].numpy()
    assert q.shape == (min(shape), math.ceil(options.get("rank_fraction", 1) * min(shape)))
    wanted = formula(course, q, iterations=rule.power_iters, feedback=rule.error_feedback)
    np.testing.assert_allclose(course.run("dion", qr=qr, **options), wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("qr", QR)
@pytest.mark.parametrize("case", AUTHORS, ids=str)
def test_as_the_authors(case, qr):
    _, shape, fraction, iterations = case
    rng = np.random.default_rng(3)
    p = torch.nn.Parameter(torch.tensor(rng.normal(size=shape).astype(np.float32)))
    optimizer = Optimizer([p], dion(qr=qr, rank_fraction=fraction, power_iters=iterations), lr=0.02, weight_decay=0.01)
    q = torch.tensor(np.random.default_rng(9).normal(size=(4, int(4 * fraction))), dtype=torch.float32)
    optimizer.load_full_state_dict({"0": {"step": 0, "m": torch.zeros(shape), "q": q}})
    for _ in range(6):
        p.grad = torch.tensor(rng.normal(size=shape).astype(np.float32))
        optimizer.step()
    np.testing.assert_allclose(p.detach()[[0, -1]].numpy(), AUTHORS[case], atol=2e-6)


def test_rank():
    assert [dion(rank_fraction=f).rank(100, 30) for f in (1.0, 0.5, 0.1, 0.01)] == [30, 15, 3, 1]
    assert dion(rank_fraction=0.3, rank_multiple_of=8).rank(100, 30) == 16
    assert dion(rank_fraction=0.07).rank(100, 100) == 7
    assert dion(rank_fraction=0.9, rank_multiple_of=16).rank(100, 30) == 30


@pytest.mark.parametrize("qr", QR)
@pytest.mark.parametrize("shape", [(300, 40), (40, 300), (64, 64)], ids=str)
def test_the_step_is_as_long_as_the_root_of_the_rank(shape, qr):
    """Exact (1), in float32, along a trajectory, for gradients whose columns span four orders."""
    rule = dion(qr=qr, rank_fraction=0.5)
    state = {k: v[None] for k, v in rule.init(torch.zeros(shape)).items()}
    decay = torch.logspace(0, -4, shape[1])
    for t in range(1, 6):
        g = random(1, *shape, seed=t, dtype=torch.float32) * decay
        direction = rule.update(g, g, state, Step(t=t, lr=1.0)) / math.sqrt(shape[0] / shape[1])
        assert torch.linalg.matrix_norm(direction).item() == pytest.approx(math.sqrt(min(shape) / 2), rel=1e-5)


@pytest.mark.parametrize("qr", QR)
@pytest.mark.parametrize("span", [0, 3, 9])
def test_columns_are_orthonormal(qr, span):
    """Exact (1): to 1e-5 in float32, whatever the condition, for zero and for repeated columns; the span is kept."""
    x = random(3, 400, 60, dtype=torch.float32) * torch.logspace(0, -span, 60)
    x[1, :, 7], x[1, :, 3] = x[1, :, 8], 0.0
    q = orthonormal(x, qr)
    torch.testing.assert_close(q.mT @ q, torch.eye(60).expand(3, -1, -1), rtol=0, atol=1e-5)
    torch.testing.assert_close(q @ (q.mT @ x), x, rtol=1e-4, atol=1e-6)


def test_variants_agree():
    """Exact (7): P Qᵀ in float32 over 30 steps on noisy gradients."""
    rules = [dion(qr=qr, rank_fraction=0.25) for qr in QR]
    states = [{k: v[None] for k, v in r.init(torch.zeros(400, 96)).items()} for r in rules]
    for t in range(1, 31):
        g = random(1, 400, 96, seed=t, dtype=torch.float32) * torch.logspace(0, -2, 96)
        one, *others = (r.update(g, g, s, Step(t=t, lr=1.0)) for r, s in zip(rules, states, strict=True))
        for other in others:
            assert (one - other).abs().max() < 1e-3 * one.abs().max()


def test_many_iterations_give_the_leading_singular_vectors():
    """Exact (2)."""
    u, v = torch.linalg.qr(random(20, 12)).Q, torch.linalg.qr(random(12, 12, seed=1)).Q
    b = u * torch.logspace(1, -2, 12, dtype=torch.float64) @ v.T
    for rank in (3, 12):
        q = gaussian((12, rank), like=b)
        p, _, unit = power_factors(b, q, iterations=60)
        torch.testing.assert_close(p @ unit.T, u[:, :rank] @ v[:, :rank].T, rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", [(10, 10), (14, 6), (6, 14)], ids=str)
def test_full_rank_decays_the_whole_momentum(shape):
    """Exact (3): M ← μ (M + G), and on a frozen direction the update becomes the polar factor."""
    rule, g = dion(power_iters=200), random(1, *shape)
    state = {"m": random(1, *shape, seed=1), "q": gaussian((1, min(shape), min(shape)), like=g)}
    total = g + state["m"]
    direction = rule.update(g, g, state, Step(t=1, lr=1.0))
    torch.testing.assert_close(state["m"], 0.95 * total, rtol=1e-12, atol=1e-12)
    u, _, vh = torch.linalg.svd(total, full_matrices=False)
    torch.testing.assert_close(direction, math.sqrt(shape[0] / shape[1]) * u @ vh, rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", [(12, 8), (8, 12)], ids=str)
def test_replicas_with_local_gradients_are_one_worker_with_the_mean(shape):
    """Exact (4), 50 steps, four replicas: equal P and Q, and the mean of the local momenta is the momentum of one."""
    rule, replicas = dion(rank_fraction=0.25), 4
    tall = shape[0] > shape[1]
    alone = {k: v[None] for k, v in rule.init(torch.zeros(shape, dtype=torch.float64)).items()}
    momenta, q = torch.zeros(replicas, *(shape if tall else shape[::-1]), dtype=torch.float64), alone["q"].clone()
    for t in range(1, 51):
        grads = random(replicas, *shape, seed=t)
        direction = rule.update(grads.mean(0, keepdim=True), grads[:1], alone, Step(t=t, lr=1.0))
        momenta = momenta + (grads if tall else grads.mT)
        p, r, q = power_factors(momenta, q, eps=1e-8, mean=lambda x: x.mean(0, keepdim=True))
        momenta = momenta - 0.05 * p @ r.mT
        mine = math.sqrt(shape[0] / shape[1]) * p @ q.mT
        torch.testing.assert_close(mine if tall else mine.mT, direction, rtol=0, atol=1e-9)
        torch.testing.assert_close(q, alone["q"], rtol=0, atol=1e-9)
    mean = momenta.mean(0, keepdim=True)
    torch.testing.assert_close(mean if tall else mean.mT, alone["m"], rtol=0, atol=1e-9)
    assert (momenta[0] - momenta[1]).abs().max() > 1


def test_a_transposed_gradient_gives_the_transposed_step():
    """Exact (5), up to the factor of the shape."""
    rule, shape = dion(rank_fraction=0.5), (10, 6)
    states = [{k: v[None] for k, v in rule.init(torch.zeros(s, dtype=torch.float64)).items()} for s in (shape, shape[::-1])]
    for t in range(1, 4):
        g = random(1, *shape, seed=t)
        one, other = (rule.update(x, x, s, Step(t=t, lr=1.0)) for x, s in zip((g, g.mT), states, strict=True))
        torch.testing.assert_close(one / math.sqrt(10 / 6), other.mT / math.sqrt(6 / 10))


@pytest.mark.parametrize("qr", QR)
def test_zero_gradient_at_zero_momentum(qr):
    """Exact (6), next to a matrix that moves: no step, Q only normalised, no nan."""
    rule, g = dion(qr=qr, rank_fraction=0.5), random(2, 9, 6)
    g[0] = 0
    q = gaussian((6, 3), like=g)
    state = {"m": torch.zeros_like(g), "q": torch.stack([q, q])}
    direction = rule.update(g, g, state, Step(t=1, lr=1.0))
    assert not direction[0].any()
    assert direction[1].any()
    assert not state["m"][0].any()
    torch.testing.assert_close(state["q"][0], q / q.norm(dim=0))


@pytest.mark.parametrize("qr", QR)
@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_directions_without_gradient_get_no_step_of_noise(qr, fraction):
    """Rank 3 in float32: the step is the polar factor of rank 3 at most, and zero along the rest."""
    rule = dion(qr=qr, rank_fraction=fraction, power_iters=20)
    state = {k: v[None] for k, v in rule.init(torch.zeros(40, 30)).items()}
    left = random(40, 3, dtype=torch.float32)
    for t in range(1, 6):
        g = (left @ random(3, 30, seed=t, dtype=torch.float32))[None]
        direction = rule.update(g, g, state, Step(t=t, lr=1.0))[0] / math.sqrt(4 / 3)
        assert torch.linalg.matrix_norm(direction).item() == pytest.approx(math.sqrt(3), rel=1e-4)
        outside = torch.linalg.qr(left, mode="complete").Q[:, 3:].mT @ direction
        assert outside.abs().max() < 1e-4


def test_low_rank_gradients_stay_finite_and_recover():
    """Gradients of rank 1 for a while must not leave Q singular for ever."""
    rule = dion()
    state = {k: v[None] for k, v in rule.init(torch.zeros(24, 16)).items()}
    for t in range(1, 41):
        g = random(1, 24, 16, seed=t, dtype=torch.float32)
        g = g if t > 10 else g[..., :1] @ g[..., :1, :]
        direction = rule.update(g, g, state, Step(t=t, lr=1.0))
        assert torch.isfinite(direction).all()
    assert torch.linalg.svdvals(direction[0]).min() > 0.1


def test_roles():
    model = torch.nn.Module()
    model.table, model.layer, model.head = torch.nn.Embedding(9, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 9, bias=False)
    model.get_output_embeddings = lambda: model.head
    for scalar in ("adamw", "lion"):
        optimizer = metier.optimizers.Dion(model, lr=0.1, scalar=scalar)
        before = model.head.weight.detach().clone()
        bias = model.layer.bias.detach().clone()
        assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.1] * len(optimizer.param_groups))
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        moved = (before - model.head.weight).abs().mean().item()
        assert moved == pytest.approx(0.1 if scalar == "adamw" else 0.1 / 2, rel=1e-4)
        assert (bias - model.layer.bias).abs().mean().item() == pytest.approx(0.1, rel=1e-4)


def test_state_is_as_stated():
    state = dion(rank_fraction=0.25).init(torch.zeros(48, 32))
    assert sum(v.numel() for v in state.values()) == 48 * 32 + 32 * 8
