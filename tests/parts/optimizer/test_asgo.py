"""Oracle of optimizer/asgo: NumPy with an eigendecomposition, the authors' code, and the identities of the method."""

import math

import numpy as np
import pytest
import torch

import metier.optimizers
from metier.core import part
from metier.core.errors import UsageError
from metier.core.linalg import MARGIN, POLAR, ROOTS, inverse_root
from metier.core.optim import Optimizer, Step

SHAPES = [(4, 6), (6, 4), (5, 5)]

AUTHORS = {
    (3, 5): (
        [2.04584599, -2.55309916, 0.41262162, -0.57938683, -0.44313201],
        [0.22420326, -0.36490852, -0.26780093, -0.66152835, -1.05567741],
    ),
    (5, 3): ([2.04175329, -2.55103374, 0.41217521], [-0.26958454, -0.65533614, -1.05491376]),
}
"""First and last row after six steps of lr 0.01, weight decay 0.1: infinity-stars/ASGO d3ef14b, optimizers/asgo.py with its
"polar" root; the "newton-schulz" root (30 steps) gives the same to 7 digits; its "newton" root cannot be called.
"""


def asgo(**options):
    return part.build("optimizer", {"asgo": options}).obj


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def first(rule, g, t=1, state=None):
    """The direction for one matrix, and its state."""
    state = state or {k: v[None] for k, v in rule.init(g).items()}
    return rule.update(g[None], g[None], state, Step(t=t, lr=1.0))[0], state


def power(v, exponent, floor=0.0):
    values, vectors = np.linalg.eigh(v)
    return vectors @ np.diag(np.maximum(values, floor) ** exponent) @ vectors.T


def formula(course, lr=0.03, wd=0.1, beta1=0.9, beta2=0.8, rescale=True, every=1, theory=False, turn=0):
    w, m, v, out = course.start.copy(), 0.0, 0.0, []
    left = w.shape[0] < w.shape[1]
    for t, g in enumerate(course.grads, 1):
        gram = g @ g.T if left else g.T @ g
        m = g if theory else beta1 * m + (1 - beta1) * g
        v = v + gram if theory else beta2 * v + (1 - beta2) * gram
        if theory:
            root = np.linalg.inv(power(v, 0.5) + 1e-10 * np.eye(len(v)))
        elif t == 1 or (t + turn) % every == 0:
            root = power(v, -0.5, 1e-10 * np.sqrt((v**2).sum()))
        u = root @ m if left else m @ root
        if rescale and not theory:
            u = u * 0.2 * math.sqrt(w.size) / np.sqrt((u**2).sum())
        w = (1 - lr * wd) * w - lr * u
        out.append(w)
    return np.stack(out)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"rescale": False}, {"beta1": 0.5, "beta2": 0.95}, {"theory": True}, {"every": 3}], ids=str
)  # fmt: skip
def test_formula(make_course, shape, options):
    course = make_course(shape)
    got = course.run("asgo", **options)
    np.testing.assert_allclose(got, formula(course, **options), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("root", ROOTS)
def test_every_root_gives_the_formula(make_course, root):
    """On gradients of one size, so that no eigenvalue is near the regularisation."""
    course = make_course((4, 12))
    course.grads = [g * 2.0**t for t, g in enumerate(course.grads)]
    np.testing.assert_allclose(course.run("asgo", root=root), formula(course), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("root", ROOTS)
@pytest.mark.parametrize("shape", AUTHORS, ids=str)
def test_as_the_authors(shape, root):
    rng = np.random.default_rng(3)
    p = torch.nn.Parameter(torch.tensor(rng.normal(size=shape).astype(np.float32)))
    optimizer = Optimizer([p], asgo(root=root), lr=0.01, weight_decay=0.1)
    for _ in range(6):
        p.grad = torch.tensor(rng.normal(size=shape).astype(np.float32))
        optimizer.step()
    np.testing.assert_allclose(p.detach()[[0, -1]].numpy(), AUTHORS[shape], atol=2e-6)


def test_no_momentum_and_no_memory_give_the_polar_factor():
    """Exact (1)."""
    for shape in SHAPES:
        g = random(*shape)
        u, _, vh = torch.linalg.svd(g, full_matrices=False)
        got, _ = first(asgo(beta1=0.0, beta2=0.0, rescale=False), g)
        torch.testing.assert_close(got, u @ vh, rtol=0, atol=1e-6)


def test_the_transpose_is_preconditioned_from_the_other_side():
    """Exact (2)."""
    rule, a, b = asgo(), None, None
    for t in range(1, 5):
        g = random(4, 7, seed=t)
        one, a = first(rule, g, t, a)
        other, b = first(rule, g.mT, t, b)
        torch.testing.assert_close(one, other.mT)


@pytest.mark.parametrize("scale", [1e-12, 1e-4, 1e6])
@pytest.mark.parametrize("root", ROOTS)
def test_scaling_the_gradient_changes_nothing(scale, root):
    """Exact (3): ‖U‖_F = 0.2 √(mn), also where squares of float32 would underflow."""
    rule, a, b = asgo(root=root), None, None
    for t in range(1, 4):
        g = random(8, 30, seed=t, dtype=torch.float32)
        one, a = first(rule, g, t, a)
        other, b = first(rule, g * scale, t, b)
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
        assert torch.linalg.matrix_norm(one).item() == pytest.approx(0.2 * math.sqrt(240), rel=1e-5)


def test_rotating_the_gradient_rotates_the_step():
    """Exact (4): G → O G Q."""
    o, q = torch.linalg.qr(random(4, 4, seed=8)).Q, torch.linalg.qr(random(7, 7, seed=9)).Q
    rule, a, b = asgo(), None, None
    for t in range(1, 5):
        g = random(4, 7, seed=t)
        one, a = first(rule, g, t, a)
        other, b = first(rule, o @ g @ q, t, b)
        torch.testing.assert_close(o @ one @ q, other)


def test_the_gram_matrix_stays_symmetric_and_positive():
    """Exact (5), in float32, with gradients of rank 2."""
    rule, state = asgo(), None
    for t in range(1, 30):
        direction, state = first(
            rule, random(20, 2, seed=t, dtype=torch.float32) @ random(2, 30, seed=-t, dtype=torch.float32), t, state
        )
        assert torch.isfinite(direction).all()
    v = state["v"][0, 0]
    torch.testing.assert_close(v, v.mT, rtol=0, atol=1e-5 * v.abs().max().item())
    assert torch.linalg.eigvalsh(v.double()).min() > -1e-5 * v.abs().max()


@pytest.mark.parametrize("root", ROOTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("condition", [1.0, 1e2, 1e4])
def test_inverse_roots_agree(root, dtype, condition):
    """Exact (5): each method against the spectrum that the matrix is made of, of a stack of different sizes."""
    basis = torch.linalg.qr(random(3, 24, 24)).Q
    values = torch.logspace(0, -math.log10(condition), 24, dtype=torch.float64)
    size = torch.tensor([1e-9, 1.0, 1e7], dtype=torch.float64)[:, None, None]
    v = size * (basis * values) @ basis.mT
    wanted = (basis * values.rsqrt()) @ basis.mT / size.sqrt()
    got = inverse_root(v.to(dtype), method=root).double()
    error = torch.linalg.matrix_norm(got - wanted, ord=2) / torch.linalg.matrix_norm(wanted, ord=2)
    assert error.max() < (1e-3 if dtype == torch.float32 else 2e-6)


@pytest.mark.parametrize("root", ROOTS)
def test_degenerate_matrices_give_finite_roots(root):
    v = torch.zeros(4, 6, 6)
    v[1], v[2, 0, 0], v[3] = torch.eye(6) * 1e30, 1.0, torch.inf
    got = inverse_root(v, method=root)
    assert torch.isfinite(got).all()
    torch.testing.assert_close(got[0], torch.eye(6))
    torch.testing.assert_close(got[1], torch.eye(6) * 1e-15, rtol=1e-3, atol=1e-18)
    torch.testing.assert_close(got[3], torch.eye(6))


def minimax(low, high):
    """The odd quintic closest to 1 on [low, high], by exchanging points where its error is extreme."""
    inner = np.array([(3 * low + high) / 4, (low + 3 * high) / 4])
    for _ in range(200):
        x = np.array([low, *inner, high])
        a, b, c, error = np.linalg.solve(np.c_[x, x**3, x**5, [1, -1, 1, -1]], np.ones(4))
        inner = np.sqrt((-3 * b + np.array([-1, 1]) * np.sqrt(9 * b * b - 20 * a * c)) / (10 * c))
    grid = np.linspace(low, high, 1001)
    assert np.abs(a * grid + b * grid**3 + c * grid**5 - 1).max() <= abs(error) + 1e-9
    return np.array([a, b, c])


def test_polar_coefficients_are_the_minimax_ones():
    low, high = 1e-3, 1.0
    for stage in POLAR[:-1]:
        wanted = minimax(max(low, 0.02407327424182761 * high), high)
        wanted = wanted * 2 / sum(wanted @ np.array([x, x**3, x**5]) for x in (low, high))
        np.testing.assert_allclose(stage, wanted, rtol=1e-9)
        low = wanted @ np.array([low, low**3, low**5])
        high = 2 - low
    np.testing.assert_allclose(POLAR[-1], (15 / 8, -10 / 8, 3 / 8))
    assert MARGIN > 1


def test_orthogonal_rows_are_scaled_one_by_one():
    """Exact (6): with G Gᵀ diagonal the plain form is row-wise AdaGrad."""
    rule, state, squares = asgo(theory=True), None, torch.zeros(3, dtype=torch.float64)
    for t in range(1, 6):
        g = random(3, seed=t)[:, None] * torch.linalg.qr(random(7, 3, seed=20 + t)).Q.mT
        squares += g.square().sum(1)
        got, state = first(rule, g, t, state)
        torch.testing.assert_close(got, g / squares.sqrt()[:, None], rtol=1e-7, atol=1e-8)


def test_orthogonal_columns_are_moved_as_by_dasgo():
    """The right-hand side with Gᵀ G diagonal."""
    one, other = asgo(beta2=0.95), part.build("optimizer", {"dasgo": {"eps": 1e-30}}).obj
    a = b = None
    for t in range(1, 6):
        g = random(3, seed=t) * torch.linalg.qr(random(7, 3, seed=20 + t)).Q
        x, a = first(one, g, t, a)
        y, b = first(other, g, t, b)
        torch.testing.assert_close(x, y, rtol=1e-7, atol=1e-8)


def test_zero_gradients_do_not_move_anything():
    for options in ({}, {"theory": True}, {"root": "polar"}, {"rescale": False}):
        direction, _ = first(asgo(**options), torch.zeros(3, 5))
        assert not direction.any()


def moved(names, grads, start, **options):
    """Where matrices of one shape end together; ``grads[t][i]``."""
    params = [(n, torch.nn.Parameter(s.clone())) for n, s in zip(names, start, strict=True)]
    optimizer = Optimizer([{"params": params, "role": "matrices"}], asgo(**options), lr=0.1)
    for step in grads:
        for (_, p), g in zip(params, step, strict=True):
            p.grad = g.clone()
        optimizer.step()
    return [p.detach() for _, p in params], optimizer


def test_roots_are_refreshed_at_different_steps(monkeypatch):
    """Every matrix once in four steps, not all at once, and each as if it were alone."""
    from metier.parts.optimizer import asgo as module

    names = [f"layers.{i}.proj.weight" for i in range(12)]
    grads = [random(12, 4, 6, seed=t) for t in range(9)]
    start = random(12, 4, 6, seed=99)
    sizes = []
    monkeypatch.setattr(module, "inverse_root", lambda v, **kw: sizes.append(len(v)) or inverse_root(v, **kw))
    together, _ = moved(names, grads, start, every=4)
    assert sizes[0] == 12
    assert sum(sizes[1:]) == 24
    assert max(sizes[1:]) < 12
    for i, name in enumerate(names):
        alone, _ = moved([name], [g[i : i + 1] for g in grads], start[i : i + 1], every=4)
        torch.testing.assert_close(alone[0], together[i])


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("cols", [8, 4, 2])
def test_heads_are_preconditioned_apart(every, cols):
    """Rows of a query as two matrices of their own; other matrices whole; the state's size follows."""
    names = ["a.q_proj.weight", "a.v_proj.weight"]
    grads, start = [random(2, 6, cols, seed=t) for t in range(5)], random(2, 6, cols, seed=9)
    got, optimizer = moved(names, grads, start, heads=2, rescale=False, every=every)
    whole, _ = moved(names, grads, start, rescale=False, every=every)
    torch.testing.assert_close(got[1], whole[1])
    assert not torch.allclose(got[0], whole[0])
    for rows in (slice(0, 3), slice(3, 6)):
        part_, _ = moved(names[:1], [g[:1, rows] for g in grads], start[:1, rows], rescale=False, every=every)
        torch.testing.assert_close(got[0][rows], part_[0])
    shapes = {n: s["v"].shape for n, s in optimizer.full_state_dict().items()}
    assert shapes == {names[0]: (2, min(3, cols), min(3, cols)), names[1]: (1, min(6, cols), min(6, cols))}


def test_rows_that_cannot_be_cut():
    with pytest.raises(UsageError, match="6 rows"):
        moved(["q_proj"], [random(1, 6, 8)], random(1, 6, 8), heads=4)


def test_roles_have_one_learning_rate():
    model = torch.nn.Sequential(torch.nn.Embedding(9, 6), torch.nn.Linear(6, 6))
    optimizer = metier.optimizers.ASGO(model, lr=1e-3)
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([1e-3] * len(optimizer.param_groups))
    assert optimizer.rule_of("embeddings").beta2 == 0.95


def test_state_is_as_stated():
    def size(**options):
        return sum(v.numel() for v in asgo(**options).init(torch.zeros(30, 20)).values())

    assert size() == 600 + 400
    assert size(every=10) == 600 + 800
    assert size(theory=True) == 400
