"""Oracle of optimizer/soap: the algorithm in NumPy, its identities, and numbers of the authors' release."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from metier.core import eigenbasis as eigen
from metier.core import part
from metier.core.optim import Optimizer, Step, build


def rule(**options):
    return part.build("optimizer", {"soap": options}).obj


def optimizer(p, lr=0.03, weight_decay=0.1, **options):
    return Optimizer([("layers.0.w", p)], rule(**options), lr=lr, weight_decay=weight_decay)


def follow(opt, p, grads):
    seen = []
    for g in grads:
        p.grad = torch.as_tensor(g, dtype=p.dtype)
        opt.step()
        seen.append(p.detach().double().numpy().copy())
    return np.stack(seen)


def gram(g, axis):
    flat = np.moveaxis(g, axis, 0).reshape(g.shape[axis], -1)
    return flat @ flat.T


def along(x, q, axis):
    """x with its axis multiplied by qᵀ."""
    return np.moveaxis(np.tensordot(q.T, x, (1, axis)), 0, axis)


class Oracle:
    """The algorithm as printed, m kept in the original space; the first bases are given (a null space has many)."""

    def __init__(self, shape, bases, b1=0.95, b2=0.95, bs=None, eps=1e-8, f=10, factorized=False, normalize=False, bias=True):
        self.shape, self.q, self.b1, self.b2, self.bs = shape, dict(bases), b1, b2, b2 if bs is None else bs
        self.eps, self.f, self.factorized, self.normalize, self.bias = eps, f, factorized and len(shape) > 1, normalize, bias
        self.s, self.m, self.v = 0, np.zeros(shape), np.zeros(shape)
        self.rows, self.cols = np.zeros(shape[:-1]), np.zeros(shape[:-2] + shape[-1:])

    def first(self, g):
        self.factors = {a: (1 - self.bs) * gram(g, a) for a in self.q}
        for a, q in self.q.items():
            np.testing.assert_allclose(q.T @ q, np.eye(len(q)), atol=1e-12)
            diagonal = q.T @ self.factors[a] @ q
            np.testing.assert_allclose(diagonal, np.diag(np.linalg.eigvalsh(self.factors[a])[::-1]), atol=1e-12)

    def direction(self, g):
        self.s += 1
        self.m = self.b1 * self.m + (1 - self.b1) * g
        turned, m = g, self.m
        for a, q in self.q.items():
            turned, m = along(turned, q, a), along(m, q, a)
        if self.factorized:
            self.rows = self.b2 * self.rows + (1 - self.b2) * (turned**2).sum(-1)
            self.cols = self.b2 * self.cols + (1 - self.b2) * (turned**2).sum(-2)
            self.v = self.rows[..., :, None] * self.cols[..., None, :] / self.rows.sum(-1)[..., None, None]
        else:
            self.v = self.b2 * self.v + (1 - self.b2) * turned**2
        u = m / (np.sqrt(self.v) + self.eps)
        for a, q in self.q.items():
            u = along(u, q.T, a)
        if self.normalize:
            u = u / np.sqrt(np.mean(u**2))
        scale = np.sqrt(1 - self.b2**self.s) / (1 - self.b1**self.s) if self.bias else 1.0
        for a in self.q:
            self.factors[a] = self.bs * self.factors[a] + (1 - self.bs) * gram(g, a)
            if self.s % self.f == 0:
                self.refresh(a)
        return scale * u

    def refresh(self, a):
        order = np.argsort(-np.diag(self.q[a].T @ self.factors[a] @ self.q[a]))
        self.q[a] = np.linalg.qr(self.factors[a] @ self.q[a][:, order])[0]
        self.v, last = np.take(self.v, order, axis=a), self.m.ndim - 1
        if self.factorized and a != last:
            self.rows = np.take(self.rows, order, axis=a)
        if self.factorized and a != last - 1:
            self.cols = np.take(self.cols, order, axis=min(a, last - 1))

    def run(self, start, grads, lr=0.03, wd=0.1):
        p, out = start.copy(), [start.copy()]
        self.first(grads[0].reshape(self.shape))
        for g in grads[1:]:
            p = p - lr * self.direction(g.reshape(self.shape)).reshape(p.shape)
            p = p - lr * wd * p
            out.append(p)
        return np.stack(out)


def against_oracle(course, shape=None, axes=None, **options):
    names = {
        "b1": "beta1",
        "b2": "beta2",
        "bs": "shampoo_beta",
        "f": "precondition_frequency",
        "normalize": "normalize_grads",
        "bias": "correct_bias",
    }
    ours = {names.get(k, k): v for k, v in options.items()}
    p = nn.Parameter(torch.tensor(course.start))
    opt = optimizer(p, spread=False, **ours)
    follow(opt, p, course.grads[:1])
    bases = {int(k[5:]): v.numpy().copy() for k, v in opt.state[p].items() if k.startswith("basis")}
    bases = {a: v.reshape(round(v.size**0.5), -1) for a, v in bases.items()}
    assert axes is None or sorted(bases) == axes
    got = np.concatenate([course.start[None], follow(opt, p, course.grads[1:])])
    known = {k: v for k, v in options.items() if k not in ("one_sided", "merge_dims", "precondition_1d", "max_precond_dim")}
    wanted = Oracle(shape or course.start.shape, bases, **known).run(course.start, course.grads)
    np.testing.assert_allclose(got, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("factorized", [False, True])
@pytest.mark.parametrize("f", [1, 3, 10])
def test_algorithm(course, f, factorized):
    against_oracle(course, f=f, factorized=factorized, axes=[a for a in range(course.start.ndim) if course.start.ndim > 1])


def test_square(make_course):
    against_oracle(make_course((5, 5)), f=2, b1=0.9, b2=0.98, bs=0.8)


@pytest.mark.parametrize(
    ("shape", "axes"), [((4, 6), [0]), ((6, 4), [1]), ((5, 5), [1]), ((3, 2, 4), [1]), ((1, 4, 6), [1]), ((7,), [])]
)
@pytest.mark.parametrize("factorized", [False, True])
def test_one_sided(make_course, shape, axes, factorized):
    against_oracle(make_course(shape), axes=axes, f=3, one_sided=True, factorized=factorized)


@pytest.mark.parametrize(
    "options",
    [{"normalize": True}, {"bias": False}, {"eps": 1e-2}, {"b1": 0.0, "b2": 0.9}, {"bs": 0.0, "f": 4}],
    ids=str,
)
def test_options(make_course, options):
    against_oracle(make_course((5, 5)), **{"f": 2, **options})


def test_long_axes_are_not_rotated(make_course):
    against_oracle(make_course((4, 6)), axes=[0], f=2, max_precond_dim=5)
    against_oracle(make_course((6, 7)), axes=[], f=2, max_precond_dim=5)


def test_vectors_and_merged_axes(make_course):
    against_oracle(make_course((3,)), axes=[0], f=100, precondition_1d=True)
    against_oracle(make_course((2, 3, 5)), shape=(6, 5), axes=[0, 1], f=3, merge_dims=True, max_precond_dim=6)
    against_oracle(make_course((2, 3, 5)), shape=(6, 5), axes=[0, 1], f=3, merge_dims=True, max_precond_dim=6, factorized=True)


def test_first_step_only_initialises(matrix):
    p = nn.Parameter(torch.tensor(matrix.start))
    opt = optimizer(p, weight_decay=0.5)
    np.testing.assert_array_equal(follow(opt, p, matrix.grads[:1])[0], matrix.start)


def test_without_axes_it_is_adamw_one_step_late(course):
    """Identity 1: ε = 0, for it stands inside another denominator."""
    p = nn.Parameter(torch.tensor(course.start))
    got = follow(optimizer(p, weight_decay=0.0, max_precond_dim=0, eps=0.0), p, course.grads)
    q = nn.Parameter(torch.tensor(course.start))
    wanted = follow(torch.optim.AdamW([q], lr=0.03, betas=(0.95, 0.95), eps=0.0, weight_decay=0.0), q, course.grads[1:])
    np.testing.assert_allclose(got[1:], wanted, rtol=1e-10)


def test_shampoo_is_adafactor_in_the_eigenbasis():
    """Identity 2 (claim 1): L^-½ G R^-½ √tr L, with L and R the sums over a batch of gradients."""
    rng = np.random.default_rng(0)
    batch, g = rng.normal(size=(20, 4, 6)), rng.normal(size=(4, 6))
    left, right = sum(x @ x.T for x in batch), sum(x.T @ x for x in batch)
    (lam, ql), (mu, qr) = np.linalg.eigh(left), np.linalg.eigh(right)
    shampoo = ql @ np.diag(lam**-0.5) @ ql.T @ g @ qr @ np.diag(mu**-0.5) @ qr.T * np.sqrt(np.trace(left))
    still = float(np.nextafter(1, 0))
    soap = rule(factorized=True, eps=0.0, correct_bias=False, beta1=0.0, beta2=still)
    p = torch.zeros(4, 6, dtype=torch.float64)
    state = soap.init(p)
    for key, value in {"row": lam, "col": mu, "basis0": ql, "basis1": qr}.items():
        state[key].copy_(torch.tensor(value).flatten())
    got = soap.update(torch.tensor(g), p, state, Step(t=2, lr=1.0, names=("w",)))
    np.testing.assert_allclose(got.numpy(), shampoo, rtol=1e-10)


@pytest.mark.parametrize(("limit", "same"), [(10, True), (0, False)])
def test_rotated_gradients_give_rotated_updates(make_course, limit, same):
    """Identity 3; Adam fails it."""
    course, rng = make_course((5, 5)), np.random.default_rng(1)
    one, two = (np.linalg.qr(rng.normal(size=(5, 5)))[0] for _ in range(2))
    ends = []
    for turn in (lambda x: x, lambda x: one @ x @ two):
        p = nn.Parameter(torch.tensor(turn(course.start)))
        opt = optimizer(p, precondition_frequency=1, max_precond_dim=limit)
        ends.append(follow(opt, p, [turn(g) for g in course.grads])[-1])
    assert np.allclose(one @ ends[0] @ two, ends[1], atol=1e-9) == same


def test_bases_stay_orthonormal():
    """Identity 4."""
    source = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.randn(8, 12, generator=source))
    opt = optimizer(p, precondition_frequency=1)
    for _ in range(1001):
        p.grad = torch.randn(8, 12, generator=source) * torch.logspace(0, -4, 12)
        opt.step()
    for a, d in enumerate(p.shape):
        q = opt.state[p][f"basis{a}"].view(d, d)
        torch.testing.assert_close(q.T @ q, torch.eye(d), atol=1e-5, rtol=0)


@pytest.mark.parametrize("factorized", [False, True])
def test_refresh_only_permutes_the_second_moment(matrix, factorized):
    """Identity 5."""
    states = []
    for f in (9, 1000):
        p = nn.Parameter(torch.tensor(matrix.start))
        opt = optimizer(p, precondition_frequency=f, spread=False, factorized=factorized)
        follow(opt, p, matrix.grads)
        states.append(opt.state[p])
    assert not torch.equal(states[0]["basis0"], states[1]["basis0"])
    for key in ("row", "col") if factorized else ("v",):
        assert torch.equal(states[0][key].flatten().sort()[0], states[1][key].flatten().sort()[0])


def integers(shape):
    k = np.arange(int(np.prod(shape)), dtype=np.int64)
    return [((((k + 1) * 7919 + (t + 1) * 104729) * 2654435761 % 2**32) / 2**31 - 1).reshape(shape) for t in range(21)]


@pytest.mark.parametrize(
    ("shape", "options", "wanted"),
    [
        ((3, 3), {"precondition_frequency": 3}, [0.8310737, 0.0423485, -0.666759, 0.040328]),
        ((3, 3), {"precondition_frequency": 1, "normalize_grads": True, "correct_bias": False, "shampoo_beta": 0.8},
         [1.2460482, -1.2495916, -0.6284685, 1.0791243]),
        ((3, 5), {"precondition_frequency": 2, "max_precond_dim": 3}, [1.326251, 0.1049957, -0.4264121, 0.2927215]),
        ((2, 2, 2, 2), {"precondition_frequency": 2, "merge_dims": True, "max_precond_dim": 4},
         [0.8999557, -0.0876665, -0.806752, -0.1302079]),
        ((4,), {}, [0.8155018, -0.2889422, -0.5587271, -0.0101715]),
        ((2, 3, 2), {"precondition_frequency": 2}, [0.6725016, -0.2414286, -0.3490334, -0.0054548]),
    ],
)  # fmt: skip
def test_as_the_authors(shape, options, wanted):
    """github.com/nikhilvyas/SOAP, soap.py at a1e5535, float32: first weights after 21 steps, lr and weight decay 0.1."""
    start = np.cos(np.arange(np.prod(shape))).reshape(shape)
    p = nn.Parameter(torch.tensor(start, dtype=torch.float32))
    got = follow(optimizer(p, lr=0.1, spread=False, **options), p, integers(shape))[-1]
    np.testing.assert_allclose(got.flatten()[:4], wanted, atol=1e-5)


def test_spread_is_nothing_at_frequency_one(matrix):
    ends = []
    for spread in (True, False):
        p = nn.Parameter(torch.tensor(matrix.start))
        ends.append(follow(optimizer(p, precondition_frequency=1, spread=spread), p, matrix.grads))
    np.testing.assert_array_equal(*ends)


def test_spread_refreshes_each_side_once_in_a_period(make_course):
    course = make_course((5, 5))
    p = nn.Parameter(torch.tensor(course.start))
    opt = optimizer(p, precondition_frequency=4)
    follow(opt, p, course.grads[:1])
    for a in range(2):
        changed = []
        own, q = copy.deepcopy(opt), None
        q = own.param_groups[0]["params"][0]
        for s, g in enumerate(course.grads[1:9], start=1):
            before = own.state[q][f"basis{a}"].clone()
            follow(own, q, [g])
            if not torch.equal(before, own.state[q][f"basis{a}"]):
                changed.append(s)
        assert changed == [s for s in range(1, 9) if s % 4 == eigen.phase("layers.0.w", a, 4)]


@pytest.mark.parametrize("dtype", [None, "bf16"])
def test_resuming_between_refreshes(dtype):
    def setup():
        source = torch.Generator().manual_seed(0)
        named = {f"layers.{i}.w": nn.Parameter(torch.randn(6, 6, generator=source)) for i in range(3)}
        return named, Optimizer(list(named.items()), rule(precondition_frequency=3), lr=0.01, weight_decay=0.1, state_dtype=dtype)

    def train(named, opt, steps):
        for t in steps:
            source = torch.Generator().manual_seed(t)
            for p in named.values():
                p.grad = torch.randn(6, 6, generator=source)
            opt.step()

    whole, opt = setup()
    train(whole, opt, range(14))
    assert all(v.dtype == torch.float32 for s in opt.state.values() for k, v in s.items() if k[:5] in ("basis", "momen"))
    first, opt = setup()
    train(first, opt, range(7))
    rest, other = setup()
    for p, q in zip(rest.values(), first.values(), strict=True):
        p.data.copy_(q.data)
    other.load_full_state_dict(copy.deepcopy(opt.full_state_dict()))
    train(rest, other, range(7, 14))
    assert all(torch.equal(p, q) for p, q in zip(whole.values(), rest.values(), strict=True))


def test_low_precision_parameters_keep_float32_state():
    source = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.randn(16, 16, generator=source).bfloat16())
    start, opt = p.detach().clone(), optimizer(p, precondition_frequency=2)
    for _ in range(6):
        p.grad = torch.randn(16, 16, generator=source).bfloat16()
        opt.step()
    assert p.dtype == torch.bfloat16
    assert torch.isfinite(p).all()
    assert not torch.equal(p, start)
    assert {v.dtype for k, v in opt.state[p].items() if k != "step"} == {torch.float32}


def test_no_gradient_at_all_moves_nothing():
    p = nn.Parameter(torch.ones(3, 4))
    got = follow(optimizer(p, weight_decay=0.0, factorized=True, precondition_frequency=1), p, [np.zeros((3, 4))] * 5)
    np.testing.assert_array_equal(got[-1], np.ones((3, 4)))


@pytest.mark.parametrize(
    ("options", "numbers"),
    [
        ({}, lambda m, n: 2 * m * n + 2 * m * m + 2 * n * n),
        ({"one_sided": True}, lambda m, n: 2 * m * n + 2 * min(m, n) ** 2),
        ({"factorized": True}, lambda m, n: m * n + m + n + 2 * m * m + 2 * n * n),
    ],
    ids=["full", "one-sided", "factorized"],
)
def test_state_size(options, numbers):
    for shape in ((4, 6), (7, 3)):
        assert sum(v.numel() for v in rule(**options).init(torch.zeros(shape)).values()) == numbers(*shape)


@pytest.mark.parametrize(("option", "keys"), [(False, ["basis1"]), (True, ["basis0", "basis1"])])
def test_vocabularies_are_not_rotated(option, keys):
    model = nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 6))
    opt = build(model, part.build("optimizer", {"soap": {"rotate_vocabulary": option}}))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    opt.step()
    assert sorted(k for k in opt.state[model[0].weight] if k.startswith("basis")) == keys
    assert sorted(k for k in opt.state[model[1].weight] if k.startswith("basis")) == ["basis0", "basis1"]
