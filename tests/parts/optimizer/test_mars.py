"""Oracle of optimizer/mars: the paper's recursion in NumPy, the authors' release, and its exact identities."""

import itertools
import math

import numpy as np
import pytest
import torch

from metier.core import part
from metier.core.errors import UsageError
from metier.core.optim import Optimizer, Step, build, default_lr
from metier.testing import optimizer as suite


def newton_schulz(x):
    """On singular values, where the quintic acts."""
    u, s, vt = np.linalg.svd(x / np.sqrt((x**2).sum()), full_matrices=False)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return (u * s) @ vt


def formula(
    course, lr=0.03, wd=0.1, base="adamw", beta1=0.95, beta2=0.99, gamma=0.025, eps=1e-8, clip=True, first_step="zero",
    second_moment="corrected",
):  # fmt: skip
    x, m, v, out = course.start.copy(), 0.0, 0.0, []
    last = course.grads[0] if first_step == "self" else np.zeros_like(x)
    for t, g in enumerate(course.grads, start=1):
        c = g + gamma * beta1 / (1 - beta1) * (g - last)
        if clip and np.sqrt((c**2).sum()) > 1:
            c = c / np.sqrt((c**2).sum())
        m = beta1 * m + (1 - beta1) * c
        v = beta2 * v + (1 - beta2) * (g if second_moment == "raw" else c) ** 2
        if base == "lion":
            direction = np.sign(m)
        elif base == "shampoo" and x.ndim == 2:
            direction = math.sqrt(max(1, x.shape[0] / x.shape[1])) * newton_schulz(m / (1 - beta1))
        else:
            direction = m / ((np.sqrt(v) / math.sqrt(1 - beta2**t) + eps) * (1 - beta1**t))
        x = x - lr * (direction + wd * x)
        last = g
        out.append(x)
    return np.stack(out)


OPTIONS = [
    {},
    {"gamma": 0.3, "beta1": 0.8, "beta2": 0.95, "eps": 1e-3},
    {"clip": False, "first_step": "self"},
    {"first_step": "self", "second_moment": "raw"},
]


@pytest.mark.parametrize(("base", "options"), itertools.product(["adamw", "lion", "shampoo"], OPTIONS), ids=str)
def test_formula(course, base, options):
    got = course.run("mars", base=base, optimize_1d=True, **options)
    np.testing.assert_allclose(got, formula(course, base=base, **options), rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("shape", [(6, 4), (5, 5), (1, 6)], ids=str)
def test_shapes_of_an_orthogonalized_step(make_course, shape):
    course = make_course(shape)
    np.testing.assert_allclose(course.run("mars", base="shampoo"), formula(course, base="shampoo"), rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("options", [{"base": "lion"}, {"base": "shampoo"}, {"second_moment": "raw"}, {"clip": False}], ids=str)
def test_contract_with_other_options(options):
    rule = part.build("optimizer", {"mars": options}).obj
    for check in suite.CHECKS:
        check("optimizer/mars", rule)


# --- tensors that are not matrices ------------------------------------------------------------------------


def test_they_are_moved_by_adamw_with_their_own_betas_and_rate(course):
    if course.start.ndim == 2:
        return
    got = course.run("mars", betas_1d=[0.8, 0.9], lr_1d=0.25, eps=1e-3)
    wanted = formula(course, lr=0.03 / 4, beta1=0.8, beta2=0.9, gamma=0.0, clip=False, eps=1e-3)
    np.testing.assert_allclose(got, wanted, rtol=1e-9, atol=1e-12)


def test_embeddings_are_matrices_like_all_others():
    model = torch.nn.Sequential(torch.nn.Embedding(9, 6), torch.nn.Linear(6, 6), torch.nn.Conv1d(6, 6, 3, bias=False))
    for base in ("adamw", "lion", "shampoo"):
        optimizer = build(model, part.build("optimizer", {"mars": {"base": base, "lr_1d": 0.25}}), lr=0.4, weight_decay=0.1)
        lr = {n: g["lr"] for g in optimizer.param_groups for n in g["param_names"]}
        assert lr == pytest.approx({"0.weight": 0.4, "1.weight": 0.4, "1.bias": 0.1, "2.weight": 0.1})
        whole = build(model, part.build("optimizer", {"mars": {"base": base, "optimize_1d": True}}), lr=0.4)
        assert {g["lr"] for g in whole.param_groups} == {0.4}


def test_betas_of_vectors_are_checked():
    for betas in ([0.9, 1.0], [0.9], 0.9):
        with pytest.raises(UsageError, match="betas_1d"):
            part.build("optimizer", {"mars": {"betas_1d": betas}})


# --- identities -------------------------------------------------------------------------------------------


def test_without_correction_and_clip_it_is_adamw(course):
    got = course.run("mars", gamma=0.0, clip=False, optimize_1d=True)
    wanted = course.follow(lambda p: torch.optim.AdamW([p], lr=0.03, betas=(0.95, 0.99), weight_decay=0.1))
    np.testing.assert_allclose(got, wanted, rtol=1e-12, atol=1e-14)


def test_every_tensor_is_clipped_for_itself():
    rule = part.build("optimizer", {"mars": {"gamma": 0.5}}).obj
    source = torch.Generator().manual_seed(0)
    grads = [torch.randn(4, 6, generator=source, dtype=torch.float64) * scale for scale in (1e-3, 1.0, 1e3)]
    c = rule.corrected(grads, [torch.zeros_like(g) for g in grads], t=2)
    norms = torch.stack([x.norm() for x in c])
    assert (norms <= 1 + 1e-12).all()
    assert norms[1:].tolist() == pytest.approx([1.0, 1.0])
    torch.testing.assert_close(c[0], grads[0] * (1 + 0.5 * 0.95 / 0.05), rtol=1e-12, atol=0)


def test_the_last_gradient_is_a_copy(matrix):
    """Gradients written into the same memory every step, as ``zero_grad(set_to_none=False)`` makes them."""
    rule = part.build("optimizer", "mars").obj
    p = torch.nn.Parameter(torch.tensor(matrix.start))
    p.grad = torch.zeros_like(p)
    optimizer = Optimizer([p], rule, lr=0.03, weight_decay=0.1)
    for g in matrix.grads:
        p.grad.zero_().add_(torch.tensor(g))
        optimizer.step()
    np.testing.assert_allclose(p.detach().numpy(), formula(matrix)[-1], rtol=1e-9)


@pytest.mark.parametrize("way", ["apply", "plain"])
def test_state_shares_no_memory_with_the_gradient(way):
    rule, p, g = part.build("optimizer", "mars").obj, torch.ones(2, 3), torch.ones(2, 3)
    state = rule.init(p)
    for t in (1, 2):
        getattr(rule, way)([p], [g], [state], Step(t=t, lr=0.1))
        assert state["last"].data_ptr() != g.data_ptr()
        assert torch.equal(state["last"], g)


def test_only_without_norms_and_products_are_pieces_enough():
    made = lambda **options: part.build("optimizer", {"mars": options}).obj.elementwise
    assert [made(), made(clip=False), made(clip=False, base="lion"), made(clip=False, base="shampoo")] == [
        False,
        True,
        True,
        False,
    ]


@pytest.mark.parametrize(("base", "copies"), [("adamw", 3), ("lion", 2), ("shampoo", 2)])
def test_state(base, copies):
    p = torch.nn.Parameter(torch.randn(8, 16))
    optimizer = Optimizer([p], part.build("optimizer", {"mars": {"base": base}}).obj, lr=0.1)
    p.grad = torch.randn(8, 16)
    optimizer.step()
    assert optimizer.state_bytes() == copies * 8 * 16 * 4


def test_low_precision_iterations_are_close(make_course):
    course = make_course((40, 60))
    exact, rough = (course.run("mars", base="shampoo", precision=x, dtype=torch.float32) for x in ("fp32", "bf16"))
    size = np.abs(exact[-1] - course.start).mean()
    assert 0 < np.abs(exact - rough).mean() < 0.02 * size


def test_default_rates():
    assert [default_lr(part.build("optimizer", {"mars": {"base": b}}).obj) for b in ("adamw", "lion", "shampoo")] == [
        3e-3,
        3e-4,
        0.02,
    ]


# --- the authors' release -----------------------------------------------------------------------------------

# Two matrices and a vector after 20 steps of MARS/optimizers/mars.py, AGI-Arena/MARS at 4831e28, on gradients a∘x - b, with
# lr 0.02, lr_1d 0.01, both weight decays 0.1, gamma 0.1; its cast to bfloat16 before Newton-Schulz switched off.
RELEASED = {
    ("adamw", False): (
        [-0.72976946, -1.06437782, -0.25566764, 0.36109416], [-0.89304179, 1.37017587], [-0.51390786, -0.48467003, -0.59571735],
    ),
    ("lion", False): (
        [-0.61314987, -0.87988874, -0.15910259, 0.20538292], [-0.68351318, 1.14472944], [-0.51390786, -0.48467003, -0.59571735],
    ),
    ("shampoo", True): (
        [-0.67651755, -1.05993331, -0.19651217, 0.32542253], [-0.87894898, 1.19006063], [-0.55061121, -0.47658234, -0.56053629],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("base", "optimize_1d"), RELEASED)
def test_as_released(base, optimize_1d):
    rng = np.random.default_rng(5)
    shapes = [(4, 3), (2, 3), (3,)]
    params = [torch.nn.Parameter(torch.tensor(rng.normal(size=s))) for s in shapes]
    batches = [[(rng.normal(1, 0.5, size=s), rng.normal(size=s)) for s in shapes] for _ in range(20)]
    rule = part.build("optimizer", {"mars": {"base": base, "optimize_1d": optimize_1d, "gamma": 0.1}}).obj
    optimizer = Optimizer(params, rule, lr=0.02, weight_decay=0.1)
    for batch in batches:
        for p, (a, b) in zip(params, batch, strict=True):
            p.grad = torch.tensor(a) * p.detach() - torch.tensor(b)
        optimizer.step()
    for p, seen in zip(params, RELEASED[base, optimize_1d], strict=True):
        np.testing.assert_allclose(p.detach().numpy().ravel()[: len(seen)], seen, atol=2e-8)
