"""Oracle of optimizer/l3rs: the card's equations in NumPy with a random controller, and its identities."""

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import save_file

from metier.core import part
from metier.core.errors import UsageError
from metier.core.optim import Optimizer
from metier.parts.optimizer import _l3rs_controller as controllers
from metier.testing import optimizer as suite

SHAPES = {"gain": (5,), "block.weight": (4, 3), "scalar": (), "conv": (2, 3, 2)}
STEPS, GAMMAS = 10, (0.5, 0.9, 0.99)
TINY = {"adamw": {"eps": 1e-30}}


def rule_of(**options):
    return part.build("optimizer", {"l3rs": options}).obj


def controller(path, names, *, random=True, **options):
    """A controller file with numbers of an ordinary size in every tensor."""
    tensors, header = rule_of(**options).blank(names, 3)
    if random:
        draw = torch.Generator().manual_seed(5)
        tensors = {k: 0.4 * torch.randn(t.shape, generator=draw) for k, t in tensors.items()}
    save_file(tensors, path, header)
    return str(path)


def material(seed=0):
    rng = np.random.default_rng(seed)
    start = {n: rng.normal(size=s) for n, s in SHAPES.items()}
    grads = [{n: rng.normal(size=s) * 0.6**t for n, s in SHAPES.items()} for t in range(STEPS)]
    return start, grads, [3.0 - 0.2 * t + 0.1 * rng.normal() for t in range(STEPS)]


def follow(rule, start, grads, losses, *, lr=0.05, weight_decay=0.1, schedule=lambda t: 1.0):
    """Positions by name after every step."""
    params = {n: torch.nn.Parameter(torch.tensor(x)) for n, x in start.items()}
    optimizer = Optimizer(list(params.items()), rule, lr=lr, weight_decay=weight_decay)
    seen = []
    for t, (g, loss) in enumerate(zip(grads, losses, strict=True)):
        for n, p in params.items():
            p.grad = torch.tensor(g[n])
        for group in optimizer.param_groups:
            group["lr"] = lr * schedule(t)
        optimizer.observe(loss=loss, progress=None if loss is None else t / STEPS)
        optimizer.step()
        seen.append({n: p.detach().numpy().copy() for n, p in params.items()})
    return seen


def norm(x):
    return np.sqrt(np.sum(np.square(x)))


class Formula:
    """The card's steps 1 to 5 for one tensor."""

    def __init__(self, file, name, theta, relative=False):
        self.w = {k: v.astype(np.float64) for k, v in load_file(file).items()}
        self.embedding = self.w["embedding"][list(SHAPES).index(name)]
        self.theta, self.relative = theta.copy(), relative
        self.m = self.v = self.momentum = 0.0
        self.a = np.zeros((5, 3))

    def step(self, k, g, loss, lr, wd):
        self.m, self.v = 0.9 * self.m + 0.1 * g, 0.999 * self.v + 0.001 * g * g
        self.momentum = 0.8 * self.momentum + 0.2 * g
        d = [self.m / (1 - 0.9**k) / (np.sqrt(self.v / (1 - 0.999**k)) + 1e-8), self.momentum]
        xi = np.array([loss, np.log(norm(g)), np.log(norm(self.theta)), *(np.log(norm(x)) for x in d)])
        for i, gamma in enumerate(GAMMAS):
            self.a[:, i] = gamma * self.a[:, i] + (1 - gamma) * xi
        a = self.a / (1 - np.array(GAMMAS) ** k)
        stats = [[*row, row[0] - row[1], row[0] - row[2], row[1] - row[2]] for row in a]
        time = [(k - 1) / STEPS, *(np.tanh((k - 1) / tau) for tau in (10, 100, 1000))]
        x = np.concatenate([np.ravel(stats), time, self.embedding])
        out = self.w["out.weight"] @ np.tanh(self.w["hidden.weight"] @ x + self.w["hidden.bias"]) + self.w["out.bias"]
        mu = np.exp(out[1:]) / np.exp(out[1:]).sum()
        size = lr * np.exp(out[0]) * (norm(self.theta) if self.relative else 1.0)
        moved = size * sum(m * x / (norm(x) + 1e-12) for m, x in zip(mu, d, strict=True))
        self.theta = self.theta * (1 - lr * wd) - moved
        return self.theta


@pytest.mark.parametrize("relative", [False, True])
def test_formula(tmp_path, relative):
    bases = ["adamw", {"sgd-momentum": {"beta": 0.8}}]
    file = controller(tmp_path / "c.safetensors", SHAPES, bases=bases)
    start, grads, losses = material()

    def schedule(t):
        return 1 - t / 20

    got = follow(rule_of(controller=file, bases=bases, relative=relative), start, grads, losses, schedule=schedule)
    for name in SHAPES:
        oracle = Formula(file, name, start[name], relative)
        for t in range(STEPS):
            wanted = oracle.step(t + 1, grads[t][name], losses[t], 0.05 * schedule(t), 0.1)
            np.testing.assert_allclose(got[t][name], wanted, rtol=1e-10, err_msg=f"{name} at step {t + 1}")


@pytest.mark.parametrize("base", ["adamw", "sgd-momentum", {"sgd-momentum": {"beta": 0.0}}, "lion"], ids=str)
@pytest.mark.parametrize("from_file", [False, True])
def test_one_base_and_a_zero_output_layer_is_normalised_descent(tmp_path, base, from_file):
    file = controller(tmp_path / "c", SHAPES, random=False, bases=[base]) if from_file else None
    start, grads, losses = material()
    got = follow(rule_of(controller=file, bases=[base]), start, grads, losses, weight_decay=0.0)
    inner = part.build("optimizer", base).obj
    for name, theta in start.items():
        p = torch.tensor(theta)
        state = inner.init(p)
        for t in range(STEPS):
            step = suite._step(inner, t + 1, [p])
            d = inner.update(torch.tensor(grads[t][name]), p, state, step).numpy()
            p = p - 0.05 * d / norm(d)
            np.testing.assert_allclose(got[t][name], p.numpy(), rtol=1e-9, atol=1e-12)


def test_weights_of_the_mix_sum_to_one_and_bound_the_step(tmp_path):
    names = list(SHAPES)
    found = controllers.load(controller(tmp_path / "c", names), bases=("adamw", "sgd-momentum"), gammas=GAMMAS)
    s, mu = found(names, torch.randn(4, 5, 3, dtype=torch.float64), 7, 0.3)
    assert s.shape == (4,)
    assert mu.shape == (4, 2)
    torch.testing.assert_close(mu.sum(1), torch.ones(4, dtype=torch.float64), rtol=0, atol=1e-15)
    assert len(set(s.tolist())) == 4
    lengths = {}
    for bases in (["adamw"], ["sgd-momentum"], ["adamw", "sgd-momentum"]):
        # Two bases see other features than one: the network's part of the step is taken away by s fixed through its bias.
        tensors, header = rule_of(bases=bases).blank(names, 0)
        tensors["out.bias"][0] = 0.7
        save_file(tensors, tmp_path / "s", header)
        start, grads, losses = material()
        got = follow(rule_of(controller=str(tmp_path / "s"), bases=bases), start, grads, losses, weight_decay=0.0)
        lengths[len(bases)] = [
            norm(now[n] - before[n]) for before, now in zip([start, *got], got, strict=False) for n in ("gain", "conv")
        ]
        limit = 0.05 * np.exp(np.float64(np.float32(0.7)))
        if len(bases) == 1:
            np.testing.assert_allclose(lengths[1], limit, rtol=1e-10)
        else:
            assert max(lengths[2]) <= limit * (1 + 1e-12)
            assert min(lengths[2]) < 0.999 * limit


@pytest.mark.parametrize("bases", [[TINY], ["sgd-momentum"], [TINY, "sgd-momentum"]], ids=len)
def test_the_scale_of_the_loss_does_not_matter(bases):
    start, grads, losses = material()
    loud = [{n: 1000 * g for n, g in each.items()} for each in grads]
    one, other = (follow(rule_of(bases=bases), start, g, losses) for g in (grads, loud))
    for name in SHAPES:
        np.testing.assert_allclose(other[-1][name], one[-1][name], rtol=1e-9)


def test_without_a_controller_the_mix_is_even_as_with_a_new_one(tmp_path):
    start, grads, losses = material()
    new = follow(rule_of(controller=controller(tmp_path / "c", SHAPES, random=False)), start, grads, losses)
    none = follow(rule_of(), start, grads, losses)
    for name in SHAPES:
        np.testing.assert_allclose(new[-1][name], none[-1][name], rtol=1e-12)


def test_an_unknown_name_has_the_zero_embedding(tmp_path):
    start, grads, losses = material()
    names = list(SHAPES)
    foreign = controller(tmp_path / "foreign", [f"other.{n}" for n in names])
    tensors = {k: torch.from_numpy(v) for k, v in load_file(foreign).items()}
    _, header = rule_of().blank(names, 0)
    known = str(tmp_path / "known")
    save_file({**tensors, "embedding": torch.zeros_like(tensors["embedding"])}, known, header)
    own = str(tmp_path / "own")
    save_file(tensors, own, header)
    unknown, zero, with_own = (follow(rule_of(controller=f), start, grads, losses)[-1] for f in (foreign, known, own))
    for name in SHAPES:
        np.testing.assert_array_equal(unknown[name], zero[name])
        assert np.abs(with_own[name] - zero[name]).max() > 1e-6


def test_without_a_loss_its_features_are_zero(tmp_path):
    """A network that looks at nothing but the loss: silent without one, else it answers."""
    tensors, header = rule_of().blank(SHAPES, 0)
    tensors["hidden.weight"].zero_()[:, :6] = 1.0
    tensors["out.weight"][0] = 1.0
    save_file(tensors, tmp_path / "c", header)
    start, grads, losses = material()
    rule = rule_of(controller=str(tmp_path / "c"))
    silent = follow(rule, start, grads, [None] * STEPS)[-1]
    plain, heard = follow(rule_of(), start, grads, losses)[-1], follow(rule, start, grads, losses)[-1]
    for name in SHAPES:
        np.testing.assert_allclose(silent[name], plain[name], rtol=1e-12)
        assert np.abs(heard[name] - plain[name]).max() > 1e-3


def test_a_base_is_asked_for_its_direction_at_rate_one_without_decay(monkeypatch):
    seen = []
    cls = part.load("sgd-momentum", "optimizer")
    monkeypatch.setattr(cls, "update", lambda self, g, p, state, step: seen.append(step))
    start, grads, losses = material()
    got = follow(rule_of(bases=["sgd-momentum"]), start, grads[:1], losses[:1], lr=0.3, weight_decay=0.5)[0]
    assert {(s.lr, s.peak, s.weight_decay, s.t) for s in seen} == {(1.0, 1.0, 0.0, 1)}
    assert [s.names for s in seen] == [(n,) for n in SHAPES]
    # It has answered that it does not move: then only the decay does.
    np.testing.assert_allclose(got["conv"], start["conv"] * 0.85, rtol=1e-12)


def test_relative_steps_are_fractions_of_the_weights():
    start, grads, losses = material()
    start["gain"] = np.zeros(5)
    got = follow(rule_of(bases=["adamw"], relative=True), start, grads[:1], losses[:1], weight_decay=0.0)[0]
    assert norm(got["conv"] - start["conv"]) == pytest.approx(0.05 * norm(start["conv"]), rel=1e-10)
    assert norm(got["gain"]) == pytest.approx(0.05, rel=1e-10)


@pytest.mark.parametrize("check", suite.CHECKS, ids=lambda c: c.__name__)
def test_contract_with_a_controller(tmp_path, check):
    tensors, header = rule_of().blank([*suite.SHAPES, "layer.1"], 3)
    draw = torch.Generator().manual_seed(5)
    save_file({k: 0.1 * torch.randn(t.shape, generator=draw) for k, t in tensors.items()}, tmp_path / "c", header)
    check("optimizer/l3rs", rule_of(controller=str(tmp_path / "c")))


def test_state_is_that_of_the_bases_and_a_few_numbers():
    state = rule_of(gammas=[0.5, 0.9, 0.99, 0.999]).init(torch.zeros(40, 60))
    assert sum(v.numel() for v in state.values()) == 3 * 40 * 60 + 5 * 4


def test_the_file_is_read_when_the_rule_is_built(tmp_path):
    start, grads, losses = material()
    file = controller(tmp_path / "c", SHAPES)
    rule = rule_of(controller=file)
    before = follow(rule, start, grads, losses)[-1]
    tensors, header = rule.blank(SHAPES, 9)
    save_file(tensors, file, header)
    for again, same in ((rule, True), (rule_of(controller=file), False)):
        now = follow(again, start, grads, losses)[-1]
        assert all(np.array_equal(now[n], before[n]) for n in SHAPES) == same


def spoil(tmp_path, **changes):
    tensors, header = rule_of().blank(["a"], 0)
    facts = json.loads(header["l3rs"]) | changes.pop("facts", {})
    save_file({**tensors, **changes}, tmp_path / "c", {"l3rs": json.dumps(facts)})
    return {"controller": str(tmp_path / "c")}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: {"controller": str(d / "nowhere")}, "there is no controller file"),
        (lambda d: {"controller": str(d)}, "not a controller file"),
        (lambda d: ((d / "c").write_text("hello"), {"controller": str(d / "c")})[1], "not a controller file"),
        (lambda d: (save_file({"x": torch.ones(1)}, d / "c"), {"controller": str(d / "c")})[1], "header has no 'l3rs'"),
        (lambda d: spoil(d, facts={"format": 2}), "of format 1"),
        (lambda d: spoil(d) | {"bases": ["adamw"]}, r'learned with bases \["adamw", "sgd-momentum"\]'),
        (lambda d: spoil(d) | {"gammas": [0.5]}, "gammas"),
        (lambda d: spoil(d, facts={"names": ["a", "b"]}), "embedding is"),
        (lambda d: spoil(d, **{"out.weight": torch.ones(2, 8)}), "out.weight is"),
        (lambda d: spoil(d, **{"more": torch.ones(2, 8)}), "more is"),
        (lambda d: spoil(d, **{"out.bias": torch.tensor([0.0, float("nan"), 0.0])}), "out.bias is not finite"),
        (lambda d: {"bases": ["muon"]}, "optimizer/muon cannot be a base"),
        (lambda d: {"bases": ["mars-exact"]}, "cannot be a base"),
        (lambda d: {"bases": ["lion-ar"]}, "cannot be a base"),
        (lambda d: {"bases": ["sophia"]}, "cannot be a base"),
        (lambda d: {"bases": ["adamv"]}, "Did you mean 'adamw'"),
        (lambda d: {"bases": []}, "at least one"),
    ],
)
def test_requests_that_are_refused(tmp_path, make, message):
    with pytest.raises(UsageError, match=message):
        rule_of(**make(tmp_path))
