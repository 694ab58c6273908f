"""F13–F15 in real runs: a value that is not finite never reaches the weights; health is kept (P5, P6)."""

import contextlib
import json
import math
from unittest import mock

import pytest
import torch
from runs import go, rows, settings, write_rows

from metier.core import log, loop, state
from metier.core.guards import NonFiniteError
from metier.core.lossmodule import LossModule

STEP = 4
"""The poisoned step, counted from 0."""


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data") / "text.jsonl", rows())


class Watch:
    """Poisons from step ``STEP`` on for ``length`` steps; keeps the weights before and after each step."""

    def __init__(self, kind: str, value: float, length: int = 1) -> None:
        self.kind, self.value, self.length = kind, value, length
        self.before: dict[int, list[torch.Tensor]] = {}
        self.after: dict[int, list[torch.Tensor]] = {}
        self.ids: dict[int, tuple[str, ...]] = {}
        self.calls = 0
        self.now = -1

    @contextlib.contextmanager
    def watching(self):
        real_step, real_forward, real_check = loop.Loop.step, LossModule.forward, loop.Loop._check
        watch = self

        def weights(this):
            return [p.detach().clone() for _, p in this.ctx.trainable()]

        def step(this):
            watch.now, watch.calls = this.ctx.clock.step, 0
            watch.before[watch.now] = weights(this)
            with watch.poisoned(this):
                try:
                    return real_step(this)
                finally:
                    watch.after[watch.now] = weights(this)

        def forward(this, layout):
            total, units, metrics = real_forward(this, layout)
            watch.calls += 1
            if watch.kind == "loss" and watch.on and watch.calls == 2:
                total = total * watch.value
            return total, units, metrics

        def check(this, totals, batch):
            watch.ids[watch.now] = batch.ids
            return real_check(this, totals, batch)

        with (
            mock.patch.object(loop.Loop, "step", step),
            mock.patch.object(LossModule, "forward", forward),
            mock.patch.object(loop.Loop, "_check", check),
        ):
            yield self

    @property
    def on(self) -> bool:
        return STEP <= self.now < STEP + self.length

    @contextlib.contextmanager
    def poisoned(self, this):
        """One gradient entry, through autograd as a defect in a kernel would come."""
        if self.kind != "gradient" or not self.on:
            yield
            return

        def spoil(grad):
            grad = grad.clone()
            grad.view(-1)[0] = self.value
            return grad

        handle = this.ctx.trainable()[0][1].register_hook(spoil)
        try:
            yield
        finally:
            handle.remove()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_stop_leaves_the_weights_and_names_the_batch(tmp_path, text, kind, value):
    """F13: the loss of micro-batch 2 of 3; one entry of one gradient."""
    run = settings(text, train__micro_batch=2, train__batch=6, train__save_every=2)
    with Watch(kind, value).watching() as watch, pytest.raises(NonFiniteError) as e:
        go(tmp_path / "run", run)
    assert watch.now == STEP
    assert watch.calls == 3
    assert all(torch.equal(a, b) for a, b in zip(watch.before[STEP], watch.after[STEP], strict=True))
    assert e.value.exit_code == 1
    for id in watch.ids[STEP]:
        assert id in str(e.value)
    assert "text.jsonl" in str(e.value)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["status"] == "failed"
    (guard,) = [e for e in log.read(tmp_path / "run") if e["event"] == "guard"]
    assert guard["step"] == STEP
    found = state.find(tmp_path / "run" / "checkpoints")
    assert state.read(found).step == STEP
    assert state.read(found).finite


def test_the_run_can_go_on_when_the_cause_is_gone(tmp_path, text):
    run = settings(text, train__save_every=2)
    go(tmp_path / "reference", run)
    with Watch("gradient", math.nan).watching(), pytest.raises(NonFiniteError):
        go(tmp_path / "run", run)
    go(tmp_path / "run", run)
    a, b = (state.read(state.find(tmp_path / name / "checkpoints")) for name in ("reference", "run"))
    assert all(torch.equal(t, b.tensors["model"][n]) for n, t in a.tensors["model"].items())
    assert not [e for e in log.read(tmp_path / "run") if e["event"] == "guard"], "the step was done again, and well"


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_skip_leaves_the_weights_and_goes_on(tmp_path, text, kind):
    run = settings(text, train__micro_batch=2, train__batch=6, train__on_nonfinite="skip", train__max_skips=2)
    with Watch(kind, math.nan, length=2).watching() as watch:
        result = go(tmp_path / "run", run)
    assert result.status == "done"
    for n in range(12):
        same = all(torch.equal(a, b) for a, b in zip(watch.before[n], watch.after[n], strict=True))
        assert same == (n in (STEP, STEP + 1)), n
    guards = [e for e in result.events if e["event"] == "guard"]
    assert [(e["step"], e["action"]) for e in guards] == [(STEP, "skip"), (STEP + 1, "skip")]
    assert all(torch.isfinite(w).all() for w in watch.after[11])


def test_skip_gives_up(tmp_path, text):
    run = settings(text, train__on_nonfinite="skip", train__max_skips=2)
    with (
        Watch("gradient", math.nan, length=9).watching() as watch,
        pytest.raises(NonFiniteError, match="after 2 skipped"),
    ):
        go(tmp_path / "run", run)
    assert watch.now == STEP + 2
    assert all(torch.equal(a, b) for a, b in zip(watch.before[STEP], watch.after[STEP + 2], strict=True))


def test_a_poisoned_weight_stops_the_next_step(tmp_path, text):
    """F13: nothing can undo it, but it does not spread, and no later checkpoint exists."""

    def poison(this):
        with torch.no_grad():
            this.ctx.trainable()[-1][1].view(-1)[0] = math.nan

    steps = poison_before(tmp_path, text, poison)
    assert steps == STEP


def test_poisoned_optimizer_state_stops_one_step_later(tmp_path, text):
    """F13: loss and gradient are finite at that step, so the update is made, but is not saved as healthy."""

    def poison(this):
        slot = next(iter(this.ctx.optimizer.state.values()))
        for value in slot.values():
            if torch.is_tensor(value) and value.is_floating_point() and value.ndim:
                value.view(-1)[0] = math.nan

    steps = poison_before(tmp_path, text, poison, train__save_every=1, train__keep=2)
    assert steps == STEP + 1
    kept = {p.name: state.read(p).finite for p in (tmp_path / "run" / "checkpoints").iterdir()}
    assert kept == {"step-00000004": True, "step-00000005": False}


def poison_before(tmp_path, text, poison, **changes) -> int:
    """Poison before step ``STEP``; the number of completed steps when the run stopped."""
    real = loop.Loop.step
    seen = []

    def step(this):
        seen.append(this.ctx.clock.step)
        if this.ctx.clock.step == STEP:
            poison(this)
        return real(this)

    with mock.patch.object(loop.Loop, "step", step), pytest.raises(NonFiniteError):
        go(tmp_path / "run", settings(text, **changes))
    return seen[-1]


def test_caught_on_steps_that_are_not_logged(tmp_path, text):
    """F14."""
    with Watch("loss", math.nan).watching() as watch, pytest.raises(NonFiniteError):
        go(tmp_path / "run", settings(text, train__log_every=10, train__micro_batch=2))
    assert watch.now == STEP


def bad_evaluation_after(step: int):
    real = loop.Loop.evaluate

    def evaluate(this):
        found = real(this)
        return {**found, "eval_loss": math.nan} if this.ctx.clock.step > step else found

    return mock.patch.object(loop.Loop, "evaluate", evaluate)


def test_nan_in_the_evaluation_only_is_reported(tmp_path, text):
    """F14: the run continues, the checkpoint is not marked healthy."""
    run = settings(text, train__eval_every=3, train__save_every=3, data__eval_fraction=0.2)
    with bad_evaluation_after(6):
        result = go(tmp_path / "run", run)
    assert result.status == "done"
    guards = [e["step"] for e in result.events if e["event"] == "guard"]
    assert guards == [9, 12]
    assert math.isnan(next(e for e in result.events if e["event"] == "eval" and e["step"] == 9)["eval_loss"])


def test_the_record_is_json_even_then(tmp_path, text):
    run = settings(text, train__steps=2, data__eval_fraction=0.2)
    with bad_evaluation_after(0):
        go(tmp_path / "run", run)
    json.loads((tmp_path / "run" / "run.json").read_text(), parse_constant=lambda c: pytest.fail(c))


def test_the_newest_healthy_checkpoint_outlives_a_diverging_run(tmp_path, text):
    """F15."""
    run = settings(text, train__eval_every=1, train__save_every=1, train__keep=2, data__eval_fraction=0.2)
    with bad_evaluation_after(5):
        go(tmp_path / "run", run)
    kept = {p.name: state.read(p).finite for p in (tmp_path / "run" / "checkpoints").iterdir()}
    assert kept == {"step-00000005": True, "step-00000011": False, "step-00000012": False}
