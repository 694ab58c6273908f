"""The training loop: what happens in which order, what reaches the gradient, and what is left as it was."""

import json
import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from metier.core import aux, checkpoint, config, guards, loop, models, part
from metier.core.api import train
from metier.core.optim import Rule
from metier.core.part import Positive
from metier.core.session import open_session

RUN = {
    "model": "lab/llama-50k",
    "data": {"train": "lab/pydoc", "limit": 12, "chunk": True, "max_length": 32, "eval_fraction": 0.2, "eval_limit": 4},
    "optimizer": {"sgd-momentum": {"lr": 0.1, "beta": 0.0}},
    "schedule": "constant",
    "train": {"steps": 3, "batch": 4, "clip": None},
}


def run_with(*listeners, folder, prepare=None, **changes):
    """Train RUN with objects that listen; ``prepare`` gets the session first. Returns the result and the weights."""
    given = {**RUN, **{k: v for k, v in changes.items() if k != "train"}, "train": {**RUN["train"], **changes.get("train", {})}}
    settings, document = config.load(given)
    with open_session(settings, document, folder, quiet=True, handle_signals=False) as session:
        session.listeners.extend(listeners)
        if prepare:
            prepare(session)
        result = session.train(keep_weights=False)
        return result, {n: p.detach().clone() for n, p in session.context.model.named_parameters()}


def steps(result):
    return [e for e in result.events if e["event"] == "step"]


class Recorder:
    """Writes down every event and what holds at that moment."""

    def __init__(self):
        self.seen = []

    def _note(self, name, ctx):
        grads = [p.grad is not None for _, p in ctx.trainable()]
        assert all(grads) or not any(grads)
        self.seen.append((name, ctx.clock.step, all(grads)))

    def on_start(self, ctx):
        self._note("start", ctx)

    def on_batch(self, ctx, batch):
        assert batch is ctx.layouts
        assert sum(len(layout.ids) for layout in batch) == 4
        self._note("batch", ctx)

    def on_gradients(self, ctx):
        self._note("gradients", ctx)

    def on_step(self, ctx):
        assert "loss" in ctx.metrics
        ctx.metrics["seen"] = float(len(self.seen))
        self._note("step", ctx)

    def on_eval_start(self, ctx):
        assert ctx.model.training
        self._note("eval_start", ctx)

    def on_eval_end(self, ctx):
        assert ctx.model.training
        self._note("eval_end", ctx)

    def on_end(self, ctx):
        assert (ctx.folder / "checkpoints").is_dir()
        self._note("end", ctx)


# --- events ---------------------------------------------------------------------------------------------------


def test_the_order_of_events(tmp_path):
    hook = Recorder()
    result, _ = run_with(hook, folder=tmp_path, train={"steps": 2, "eval_every": 1})
    one = lambda s: [("batch", s, False), ("gradients", s, True), ("step", s + 1, False)]
    evaluation = lambda s: [("eval_start", s, False), ("eval_end", s, False)]
    assert hook.seen == [("start", 0, False), *one(0), *evaluation(1), *one(1), *evaluation(2), ("end", 2, False)]
    assert [e["seen"] for e in steps(result)] == [3.0, 8.0]
    assert [e["event"] for e in result.events if e["event"] != "notice"] == ["step", "eval", "step", "eval", "checkpoint"]


def test_a_hook_may_replace_the_gradient(tmp_path):
    class Zero:
        def on_gradients(self, ctx):
            for _, p in ctx.trainable():
                p.grad.zero_()

    _, weights = run_with(Zero(), folder=tmp_path)
    start = dict(models.load("lab/llama-50k").model.named_parameters())
    assert all(torch.equal(weights[n], start[n]) for n in weights)


# --- auxiliary losses and after_step --------------------------------------------------------------------------


def adds(value):
    """A preparation that lets the first block add ``value(module)`` to the loss."""

    def prepare(session):
        block = models.blocks(session.context.model)[0]
        block.register_forward_hook(lambda m, *_: aux.add("extra", value(m)))

    return prepare


class Gradients:
    """The first step's gradient of one weight."""

    def __init__(self, name="model.layers.0.input_layernorm.weight"):
        self.name, self.grad = name, None

    def on_gradients(self, ctx):
        if self.grad is None:
            self.grad = dict(ctx.trainable())[self.name].grad.clone()


@pytest.mark.parametrize("micro", [None, 1, 3])
def test_auxiliary_losses_reach_the_gradient_and_the_metrics(tmp_path, micro):
    """``0.5 |w|²`` adds ``w`` to the gradient and its value to the loss, however the batch is cut."""
    plain, with_extra = Gradients(), Gradients()
    base, _ = run_with(plain, folder=tmp_path / "a", train={"micro_batch": micro})
    value = lambda m: 0.5 * m.input_layernorm.weight.square().sum()
    result, _ = run_with(with_extra, folder=tmp_path / "b", prepare=adds(value), train={"micro_batch": micro})
    torch.testing.assert_close(with_extra.grad - plain.grad, torch.ones(16), atol=1e-5, rtol=1e-5)
    assert steps(result)[0]["extra"] == pytest.approx(8.0, rel=1e-6)
    assert steps(result)[0]["loss"] - steps(base)[0]["loss"] == pytest.approx(8.0, abs=1e-5)
    assert "extra" not in steps(base)[0]


def test_auxiliary_losses_stay_out_of_the_held_out_loss(tmp_path):
    """Through the loop's own evaluation."""
    seen = {}

    def prepare(session):
        seen["plain"] = loop.Loop(session).evaluate()
        adds(lambda m: m.input_layernorm.weight.sum())(session)
        seen["extra"] = loop.Loop(session).evaluate()

    run_with(folder=tmp_path, prepare=prepare, data={**RUN["data"], "eval_fraction": 0.2, "eval_limit": 2})
    assert seen["extra"]["eval_extra"] == pytest.approx(16.0)
    assert seen["extra"]["eval_loss"] == pytest.approx(seen["plain"]["eval_loss"], abs=1e-9)


def test_after_step_of_modules_is_called_once_per_update(tmp_path):
    calls = []

    def prepare(session):
        session.context.model.model.norm.after_step = lambda: calls.append(session.context.clock.step)

    run_with(folder=tmp_path, prepare=prepare, train={"micro_batch": 1})
    assert calls == [0, 1, 2]


def test_after_step_is_left_out_with_a_skipped_update(tmp_path):
    calls = []

    def prepare(session):
        session.context.model.model.norm.after_step = lambda: calls.append(session.context.clock.step)
        bad = lambda m: m.input_layernorm.weight.sum() * (float("nan") if session.context.clock.step == 1 else 0.0)
        adds(bad)(session)

    result, _ = run_with(folder=tmp_path, prepare=prepare, train={"on_nonfinite": "skip"})
    assert calls == [0, 2]
    assert [e["action"] for e in result.events if e["event"] == "guard"] == ["skip"]


# --- rules that evaluate the loss themselves -------------------------------------------------------------------


def direction(p):
    """Random, and a function of the shape alone."""
    return torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))


@part.part("optimizer/two-point", paper="none", needs=("closure",))
@dataclass(frozen=True, kw_only=True)
class TwoPoint(Rule):
    """Moves along one random direction by the difference of two losses, in the manner of MeZO."""

    radius: Positive = 1e-3

    def step(self, closure, params, states, *, lr, weight_decay, t):
        old = [p.detach().clone() for p in params]
        z = [direction(p) for p in params]
        with torch.no_grad():
            try:
                torch._foreach_add_(params, z, alpha=self.radius)
                up = closure()
                torch._foreach_add_(params, z, alpha=-2 * self.radius)
                down = closure()
            finally:
                for p, w in zip(params, old, strict=True):
                    p.copy_(w)
            torch._foreach_add_(params, z, alpha=-lr[0] * (up - down) / (2 * self.radius))
        return up


@pytest.fixture
def two_point(monkeypatch):
    real = part.load
    chosen = lambda ref, *a, **k: TwoPoint if ref.split("/")[-1] == "two-point" else real(ref, *a, **k)
    monkeypatch.setattr(part, "load", chosen)
    return {"two-point": {"lr": 1e-4, "radius": 1e-2}}


def test_a_closure_rule_moves_by_the_difference_of_losses(tmp_path, two_point):
    """The same in float64 from the model's own loss on the first batch."""
    batch = []

    class Keep:
        def on_batch(self, ctx, layouts):
            batch.append(layouts)

    result, weights = run_with(Keep(), folder=tmp_path, optimizer=two_point, train={"steps": 1, "micro_batch": 2})
    model = models.load("lab/llama-50k").model.double()
    params = list(model.parameters())
    z = [direction(p).double() for p in params]

    @torch.no_grad()
    def loss(shift):
        for p, d in zip(params, z, strict=True):
            p.add_(d, alpha=shift)
        ids = torch.cat([layout.input_ids for layout in batch[0]])
        logps = model(input_ids=ids).logits.log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])
        for p, d in zip(params, z, strict=True):
            p.add_(d, alpha=-shift)
        return -float(logps.mean())

    slope = (loss(1e-2) - loss(-1e-2)) / 2e-2
    for (n, p), d in zip(model.named_parameters(), z, strict=True):
        torch.testing.assert_close(weights[n].double(), p - 1e-4 * slope * d, atol=2e-6, rtol=1e-4)
    assert steps(result)[0]["loss"] == pytest.approx(loss(1e-2), rel=1e-5)
    assert steps(result)[0]["grad_norm"] == 0.0


@pytest.mark.parametrize("evaluation", [1, 2])
def test_weights_are_put_back_when_a_closure_meets_a_loss_that_is_not_finite(tmp_path, two_point, evaluation):
    count = [0]

    def nan_at(m):
        count[0] += 1
        return m.input_layernorm.weight.sum() * (float("nan") if count[0] == evaluation else 0.0)

    with pytest.raises(guards.NonFiniteError):
        run_with(folder=tmp_path / "stop", optimizer=two_point, prepare=adds(nan_at))
    count[0] = 0
    result, weights = run_with(
        folder=tmp_path / "skip", optimizer=two_point, prepare=adds(nan_at),
        train={"on_nonfinite": "skip", "steps": 1},
    )  # fmt: skip
    start = dict(models.load("lab/llama-50k").model.named_parameters())
    assert all(torch.equal(weights[n], start[n]) for n in weights)
    assert result.step == 1


def test_closures_see_the_same_randomness_within_a_step_and_other_in_the_next(tmp_path, two_point):
    drawn = []

    def noise(m):
        if m.training:
            drawn.append(float(torch.rand(())))
        return m.input_layernorm.weight.sum() * 0

    run_with(folder=tmp_path, optimizer=two_point, prepare=adds(noise), train={"steps": 2})
    assert drawn[0] == drawn[1] != drawn[2] == drawn[3]


# --- length ---------------------------------------------------------------------------------------------------


def test_max_seconds_ends_cleanly_with_evaluation_and_checkpoint(tmp_path, monkeypatch):
    class Clock:
        now = 0.0

        @classmethod
        def monotonic(cls):
            cls.now += 1.0
            return cls.now

    monkeypatch.setattr(loop, "time", Clock)
    result, _ = run_with(folder=tmp_path, train={"steps": 50, "max_seconds": 10.0})
    assert result.status == "ended"
    assert 1 < result.step < 10
    assert [e["event"] for e in result.events[-2:]] == ["eval", "checkpoint"]
    assert any("max_seconds=10" in e.get("text", "") for e in result.events)


def test_log_every_thins_the_log_and_keeps_the_last_step(tmp_path):
    dense, _ = run_with(folder=tmp_path / "a", train={"steps": 5})
    thin, _ = run_with(folder=tmp_path / "b", train={"steps": 5, "log_every": 2})
    assert [e["step"] for e in steps(dense)] == [1, 2, 3, 4, 5]
    assert [e["step"] for e in steps(thin)] == [2, 4, 5]
    assert [e["loss"] for e in steps(thin)] == [steps(dense)[i]["loss"] for i in (1, 3, 4)]


def test_the_end_of_the_data_is_an_end_and_is_said(tmp_path):
    def short(session):
        session.loader.stop_at = 6

    result, _ = run_with(folder=tmp_path, prepare=short, train={"steps": 50})
    assert (result.status, result.step) == ("ended", 2)
    assert [e["units"] for e in steps(result)] == [4 * 31, 2 * 31]
    assert any("data have ended" in e.get("text", "") for e in result.events)


def test_elapsed_goes_on_after_a_resume(tmp_path):
    train({**RUN, "train": {**RUN["train"], "steps": 2}}, out=tmp_path, quiet=True)
    done = train({**RUN, "train": {**RUN["train"], "steps": 4}}, out=tmp_path, quiet=True)
    seconds = [e["seconds"] for e in steps(done)]
    assert len(seconds) == 4
    assert [e["elapsed"] for e in steps(done)] == pytest.approx(np.cumsum(seconds).tolist())
    assert done.events[-1]["event"] == "checkpoint"
    tokens = [e["tokens"] for e in steps(done)]
    assert tokens == [128, 256, 384, 512]


def test_a_run_that_is_at_its_end_keeps_its_result(tmp_path):
    first = train(RUN, out=tmp_path, quiet=True)
    then = json.loads((tmp_path / "run.json").read_text())
    again = train(RUN, out=tmp_path, quiet=True)
    now = json.loads((tmp_path / "run.json").read_text())
    assert again.metrics == pytest.approx(first.metrics)
    assert now["metrics"] == pytest.approx(then["metrics"])
    assert now["seconds"] > then["seconds"]
    assert len(steps(again)) == 3


# --- the update -----------------------------------------------------------------------------------------------


def test_clipping_scales_the_whole_gradient_to_the_norm_and_no_further(tmp_path):
    class Norms:
        def __init__(self):
            self.norms = []

        def on_gradients(self, ctx):
            self.norms.append(float(torch.cat([p.grad.flatten() for _, p in ctx.trainable()]).double().norm()))

    free, cut, loose = Norms(), Norms(), Norms()
    result, _ = run_with(free, folder=tmp_path / "a")
    first = free.norms[0]
    assert steps(result)[0]["grad_norm"] == pytest.approx(first, rel=1e-5)
    cut_result, _ = run_with(cut, folder=tmp_path / "b", train={"clip": first / 4})
    assert cut.norms[0] == pytest.approx(first / 4, rel=1e-5)
    assert steps(cut_result)[0]["grad_norm"] == pytest.approx(first, rel=1e-5)
    run_with(loose, folder=tmp_path / "c", train={"clip": first * 4})
    assert loose.norms[0] == first


def test_a_step_of_sgd_is_the_gradient_of_the_mean_loss(tmp_path):
    grad = Gradients()
    _, weights = run_with(grad, folder=tmp_path, train={"steps": 1})
    start = dict(models.load("lab/llama-50k").model.named_parameters())[grad.name].detach()
    torch.testing.assert_close(weights[grad.name], start - 0.1 * grad.grad)


# --- what is left as it was -----------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"adapter": {"lora": {"rank": 2}}}, {"transform": ["qk-norm"]}])
def test_the_callers_generators_are_untouched(tmp_path, changes):
    torch.manual_seed(1)
    random.seed(2)
    np.random.seed(3)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    run_with(folder=tmp_path, train={"steps": 1}, **changes)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.array_equal(np.random.get_state()[1], before[2])


def test_the_result_does_not_depend_on_the_callers_generators(tmp_path):
    ends = []
    for i, seed in enumerate((1, 99)):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        _, weights = run_with(folder=tmp_path / str(i), adapter={"lora": {"rank": 2}})
        ends.append(weights)
    assert all(torch.equal(ends[0][n], ends[1][n]) for n in ends[0])


def test_modes_are_put_back_after_an_evaluation(tmp_path):
    """A module that somebody keeps in evaluation mode stays so."""
    kept = []

    class Frozen:
        def on_start(self, ctx):
            ctx.model.model.norm.eval()

        def on_step(self, ctx):
            kept.append(ctx.model.model.norm.training)

    run_with(Frozen(), folder=tmp_path, train={"eval_every": 1})
    assert kept == [False] * 3


def test_gradients_kept_and_generators_of_the_context(tmp_path):
    class Extra:
        drawn: list = []

        def on_gradients(self, ctx):
            before = [p.grad.clone() for _, p in ctx.trainable()]
            with ctx.gradients_kept():
                assert all(p.grad is None for _, p in ctx.trainable())
                ctx.loss(ctx.layouts[0]).backward()
            assert all(torch.equal(p.grad, g) for (_, p), g in zip(ctx.trainable(), before, strict=True))
            rand = lambda name: float(torch.rand((), generator=ctx.generator(name)))
            self.drawn.append((rand("a"), rand("a"), rand("b")))

    hook = Extra()
    result, _ = run_with(hook, folder=tmp_path)
    plain, _ = run_with(folder=tmp_path / "plain")
    assert [e["loss"] for e in steps(result)] == [e["loss"] for e in steps(plain)]
    assert all(a == again != b for a, again, b in hook.drawn)
    assert len({a for a, _, _ in hook.drawn}) == 3


def test_a_failed_save_is_not_taken_for_a_checkpoint(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        run_with(folder=tmp_path)
    assert '"checkpoint"' not in (tmp_path / "metrics.jsonl").read_text()
