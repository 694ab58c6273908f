"""Oracle of optimizer/mars-exact: the recursion with both gradients in NumPy, STORM, the authors' release and its loop."""

import itertools
import json

import numpy as np
import pytest
import torch

import metier
from metier.core import part, shards
from metier.core.errors import MetierError, UsageError
from metier.core.optim import Optimizer
from metier.testing import optimizer as suite

SHAPES = [(4, 3), (2, 3), (3,)]


class Quadratics:
    """Batch t has the loss Σ a∘x²/2 - b∘x over all tensors, with its own a and b; or always the first's."""

    def __init__(self, shapes=SHAPES, steps=20, full_batch=False):
        rng = np.random.default_rng(5)
        self.start = [rng.normal(size=s) for s in shapes]
        batches = [[(rng.normal(1, 0.5, size=s), rng.normal(size=s)) for s in shapes] for _ in range(steps)]
        self.batches = [batches[0]] * steps if full_batch else batches

    def gradients(self, t, xs):
        return [a * x - b for x, (a, b) in zip(xs, self.batches[t], strict=True)]

    def follow(self, name, *, lr=0.02, weight_decay=0.1, dtype=torch.float64, state_dtype=None, watch=None, **options):
        """Positions after every step."""
        params = [torch.nn.Parameter(torch.tensor(x, dtype=dtype)) for x in self.start]
        rule = part.build("optimizer", {name: options}).obj
        optimizer = Optimizer(params, rule, lr=lr, weight_decay=weight_decay, state_dtype=state_dtype)
        out = []
        for t in range(len(self.batches)):

            def closure(backward=True, t=t):
                for p, (a, b) in zip(params, self.batches[t], strict=True):
                    p.grad = torch.tensor(a, dtype=dtype) * p.detach() - torch.tensor(b, dtype=dtype)
                return float(t)

            assert optimizer.step(closure) == t
            out.append([p.detach().double().numpy().copy() for p in params])
            if watch:
                watch(t, params, optimizer)
        return out


def formula(
    task, lr=0.02, wd=0.1, base="adamw", b1=0.95, b2=0.99, gamma=0.025, eps=1e-8, clip=True, first_step="zero", max_norm=1.0
):
    """adamw and lion, all tensors by MARS."""
    xs, before = [x.copy() for x in task.start], None
    m, v, out = [0.0] * len(xs), [0.0] * len(xs), []

    def gradients(t, at):
        gs = task.gradients(t, at)
        norm = np.sqrt(sum((g**2).sum() for g in gs))
        return [g * min(1.0, max_norm / (norm + 1e-6)) for g in gs] if max_norm else gs

    for t in range(len(task.batches)):
        gs = gradients(t, xs)
        last = gradients(t, before) if t else gs if first_step == "self" else [0 * g for g in gs]
        before = [x.copy() for x in xs]
        for i, (g, old) in enumerate(zip(gs, last, strict=True)):
            c = g + gamma * b1 / (1 - b1) * (g - old)
            c = c / max(1.0, np.sqrt((c**2).sum())) if clip else c
            m[i] = b1 * m[i] + (1 - b1) * c
            v[i] = b2 * v[i] + (1 - b2) * c**2
            adam = m[i] / (1 - b1 ** (t + 1)) / (np.sqrt(v[i] / (1 - b2 ** (t + 1))) + eps)
            xs[i] = xs[i] - lr * ((np.sign(m[i]) if base == "lion" else adam) + wd * xs[i])
        out.append([x.copy() for x in xs])
    return out


def agree(got, wanted, **tolerance):
    for a, b in itertools.zip_longest(got, wanted):
        for x, y in zip(a, b, strict=True):
            np.testing.assert_allclose(x, y, **tolerance)


OPTIONS = [{}, {"gamma": 0.4, "max_norm": None}, {"clip": False, "first_step": "self", "gamma": 0.2, "max_norm": 3.0}]


@pytest.mark.parametrize(("base", "options"), itertools.product(["adamw", "lion"], OPTIONS), ids=str)
def test_formula(base, options):
    task = Quadratics()
    agree(task.follow("mars-exact", base=base, optimize_1d=True, **options), formula(task, base=base, **options), rtol=1e-8)


def test_vectors_are_moved_by_adamw():
    task = Quadratics([(3,), (), (2, 2, 2)])
    got = task.follow("mars-exact", betas_1d=[0.8, 0.9], lr_1d=0.25, max_norm=None)
    agree(got, formula(task, lr=0.005, b1=0.8, b2=0.9, gamma=0.0, clip=False, max_norm=None), rtol=1e-8)


@pytest.mark.parametrize("options", [{"base": "lion"}, {"base": "shampoo"}, {"optimize_1d": True}], ids=str)
def test_contract_with_other_options(options):
    rule = part.build("optimizer", {"mars-exact": options}).obj
    for check in suite.CHECKS:
        check("optimizer/mars-exact", rule)


# --- identities -------------------------------------------------------------------------------------------


def test_storm():
    """γ = 1 without clips: m ← g(x) + β₁ (m - g(x₋)), both gradients on this step's batch."""
    task, seen = Quadratics([(4, 3)]), {"x": None, "m": None}

    def watch(t, params, optimizer):
        m = optimizer.state[params[0]]["m"].numpy().copy()
        if t:
            (now,), (old,) = task.gradients(t, [seen["at"]]), task.gradients(t, [seen["before"]])
            np.testing.assert_allclose(m, now + 0.95 * (seen["m"] - old), rtol=1e-10, atol=1e-13)
        seen.update(m=m, before=seen["at"], at=params[0].detach().numpy().copy())

    seen["at"] = task.start[0]
    task.follow("mars-exact", gamma=1.0, clip=False, max_norm=None, watch=watch)


@pytest.mark.parametrize("base", ["adamw", "lion", "shampoo"])
def test_on_the_full_batch_it_is_the_approximate_form(base):
    task = Quadratics(full_batch=True)
    options = {"base": base, "gamma": 0.1, "optimize_1d": True}
    agree(task.follow("mars-exact", max_norm=None, **options), task.follow("mars", **options), rtol=1e-9)


def test_the_average_has_less_variance_and_less_error():
    """10 000 runs on x²/2 with additive noise: the variance of m falls with γ, and its error about the true gradient."""
    variance, error = [], []
    for gamma in (0.0, 0.1, 0.5, 1.0):
        source = torch.Generator().manual_seed(0)
        p = torch.nn.Parameter(torch.full((1, 10_000), 2.0, dtype=torch.float64))
        options = {"gamma": gamma, "clip": False, "max_norm": None, "first_step": "self"}
        optimizer = Optimizer([p], part.build("optimizer", {"mars-exact": options}).obj, lr=0.02)
        for _ in range(50):
            noise = torch.randn(p.shape, generator=source, dtype=torch.float64)
            x = p.detach().clone()

            def closure(backward=True, p=p, noise=noise):
                p.grad = p.detach() + noise
                return 0.0

            optimizer.step(closure)
        m = optimizer.state[p]["m"] / (1 - 0.95**50)
        variance.append(m.var().item())
        error.append((m - x).square().mean().item())
    assert variance[0] > variance[1] > variance[2] > variance[3]
    assert error[0] > error[1] > error[2] > error[3]


# --- the authors' release -----------------------------------------------------------------------------------

# After 20 steps of MARS/optimizers/mars.py, AGI-Arena/MARS at 4831e28, with is_approx=False in the loop of its train_mars.py
# (the next batch's gradient stashed before every step, no outer clip); further as in test_mars.py.
RELEASED = {
    ("adamw", False): (
        [-0.62880029, -0.96032104, -0.24623459, 0.29133691], [-0.7142727, 1.22683541], [-0.51390786, -0.48467003, -0.59571735],
    ),
    ("lion", False): (
        [-0.37796595, -0.87988874, -0.15839402, 0.1665644], [-0.60525506, 1.14472944], [-0.51390786, -0.48467003, -0.59571735],
    ),
    ("shampoo", True): (
        [-0.64152433, -1.06496969, -0.20770676, 0.32108333], [-0.79698206, 1.26179494], [-0.38937373, -0.48197372, -0.48832651],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("base", "optimize_1d"), RELEASED)
def test_as_released(base, optimize_1d):
    got = Quadratics().follow("mars-exact", base=base, optimize_1d=optimize_1d, gamma=0.1, max_norm=None)[-1]
    for x, seen in zip(got, RELEASED[base, optimize_1d], strict=True):
        np.testing.assert_allclose(x.ravel()[: len(seen)], seen, atol=2e-8)


# --- weights put back -----------------------------------------------------------------------------------------


def steps(dtype=torch.float32, state_dtype=None, **options):
    """A parameter, its optimizer after three steps, and a function that makes closures."""
    p = torch.nn.Parameter(torch.randn(4, 3, generator=torch.Generator().manual_seed(1)).to(dtype))
    rule = part.build("optimizer", {"mars-exact": options}).obj
    optimizer = Optimizer([p], rule, lr=0.0123, weight_decay=0.1, state_dtype=state_dtype)

    def closure_of(seen, fail_at=0, bad_at=0):
        def closure(backward=True):
            seen.append(p.detach().clone())
            if len(seen) == fail_at:
                raise RuntimeError("the device is lost")
            p.grad = p.detach() * 0.3 + 0.01 if len(seen) != bad_at else torch.full_like(p, torch.inf)
            return 1.0

        return closure

    for _ in range(3):
        optimizer.step(closure_of([]))
    return p, optimizer, closure_of


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("state_dtype", [None, "bf16"])
def test_the_second_evaluation_is_at_the_weights_before_the_last_step(dtype, state_dtype):
    p, optimizer, closure_of = steps(dtype, state_dtype)
    places, seen = [], []
    for _ in range(2):
        places.append(p.detach().clone())
        optimizer.step(closure_of(seen))
    assert len(seen) == 4
    assert torch.equal(seen[2], places[1])
    assert torch.equal(seen[3], places[0])


def test_the_first_step_evaluates_once():
    p = torch.nn.Parameter(torch.ones(2, 3))
    calls = []

    def closure(backward=True):
        calls.append(1)
        p.grad = torch.ones(2, 3)
        return 0.0

    Optimizer([p], part.build("optimizer", "mars-exact").obj, lr=0.1).step(closure)
    assert len(calls) == 1


@pytest.mark.parametrize(("failure", "error"), [("fail_at", RuntimeError), ("bad_at", MetierError)])
@pytest.mark.parametrize("evaluation", [1, 2])
def test_a_failed_evaluation_leaves_everything_as_it_was(failure, error, evaluation):
    p, optimizer, closure_of = steps()
    # Small beside the weights before, so that adding a difference back would lose bits.
    p.detach().mul_(1e-4)
    before = p.detach().clone()
    state = {k: v.clone() for k, v in optimizer.state[p].items() if k != "step"}
    with pytest.raises(error):
        optimizer.step(closure_of([], **{failure: evaluation}))
    assert torch.equal(p, before)
    for key, value in state.items():
        assert torch.equal(optimizer.state[p][key], value), key


def test_memory_that_the_second_pass_writes_over():
    """A closure that keeps its gradients in one buffer, as bucket views do, gives the same steps."""
    fresh, reused = (Quadratics([(4, 3)], steps=6) for _ in range(2))
    buffer = torch.zeros(4, 3, dtype=torch.float64)
    p = torch.nn.Parameter(torch.tensor(reused.start[0]))
    optimizer = Optimizer([p], part.build("optimizer", "mars-exact").obj, lr=0.02, weight_decay=0.1)
    for t in range(6):

        def closure(backward=True, t=t):
            (g,) = reused.gradients(t, [p.detach().numpy()])
            p.grad = buffer.copy_(torch.tensor(g))
            return 0.0

        optimizer.step(closure)
    agree([[p.detach().numpy()]], fresh.follow("mars-exact")[-1:], rtol=1e-12)


def test_a_tensor_without_a_gradient_stays():
    p, q = (torch.nn.Parameter(torch.ones(2, 3)) for _ in range(2))
    optimizer = Optimizer([p, q], part.build("optimizer", "mars-exact").obj, lr=0.1, weight_decay=0.1)

    def closure(backward=True):
        p.grad = p.detach() * 0.3
        return 0.0

    for _ in range(3):
        optimizer.step(closure)
    assert torch.equal(q, torch.ones(2, 3))
    assert (p < 1).all()


def test_sharded_parameters_are_refused(monkeypatch):
    monkeypatch.setattr(shards, "is_sharded", lambda p: True)
    with pytest.raises(UsageError, match="sharded"):
        part.build("optimizer", "mars-exact").obj.init(torch.zeros(2, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state(dtype):
    p, optimizer, _ = steps(dtype)
    state = optimizer.state[p]
    assert {k for k in state if k != "step"} == {"m", "v", "previous"}
    assert state["m"].dtype == state["v"].dtype == torch.float32
    assert state["previous"].dtype == dtype


def test_moments_stored_as_bfloat16():
    full, half = (Quadratics().follow("mars-exact", dtype=torch.float32, state_dtype=x) for x in (None, "bf16"))
    moved = [np.abs(x - start).mean() for x, start in zip(full[-1], Quadratics().start, strict=True)]
    for x, y, size in zip(full[-1], half[-1], moved, strict=True):
        assert 0 < np.abs(x - y).mean() < 0.05 * size


def test_in_the_training_loop(tmp_path):
    """Without correction and clip of c it is AdamW with the loop's own clipping, second evaluation or not."""
    losses = []
    options = {"gamma": 0.0, "clip": False, "optimize_1d": True, "max_norm": 0.5}
    for optimizer in ({"mars-exact": options}, {"adamw": {"beta1": 0.95, "beta2": 0.99}}):
        next(iter(optimizer.values())).update(lr=3e-3, weight_decay=0.1)
        folder = tmp_path / next(iter(optimizer))
        data = {"train": "lab/python", "chunk": True, "max_length": 16}
        train = {"steps": 4, "batch": 4, "micro_batch": 2, "clip": 0.5}
        metier.train({"model": "lab/llama-50k", "data": data, "optimizer": optimizer, "train": train}, out=folder, quiet=True)
        lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
        losses.append([x["loss"] for x in lines if x["event"] == "step"])
    assert len(losses[0]) == 4
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
