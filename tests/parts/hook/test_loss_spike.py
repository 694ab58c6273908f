"""Oracle of hook/loss-spike: thresholds from numpy's median, events of made-up curves, real runs that diverge.

Bugs it is meant to catch: the loss itself in its own window, a mean or an unscaled deviation, one event for every step of
a spike, a stop before its event, a dead window when losses are constant, a monitor that changes the run.
"""

import numpy as np
import pytest

from metier.core.errors import MetierError
from metier.parts.hook.loss_spike import LossSpike
from metier.testing import check_part
from metier.testing._tiny import tiny


def test_contract():
    check_part("hook/loss-spike")


def feed(hook, losses, steps=None):
    run = tiny(hook, steps=steps or len(losses))
    ctx = run.context
    ctx.emit = run.events.append
    run.dispatch("on_start", ctx)
    metrics = []
    for i, loss in enumerate(losses):
        ctx.clock = type(ctx.clock)(i + 1, ctx.clock.steps)
        ctx.metrics = {"loss": float(loss)}
        run.dispatch("on_step", ctx)
        metrics.append(ctx.metrics)
    return run.events, metrics


def threshold(before, k=6.0, floor=0.01):
    x = np.array(before)
    m = np.median(x)
    return m + k * max(1.4826 * np.median(np.abs(x - m)), floor * abs(m))


def test_threshold_against_numpy():
    rng = np.random.default_rng(0)
    losses = 4 + 0.1 * rng.standard_t(2, 300)
    hook, got = LossSpike(window=30, warmup=10), []
    ctx = tiny(hook, steps=100000).context
    hook.on_start(ctx)
    for i, loss in enumerate(losses):
        want = None if i < 10 else threshold(losses[max(0, i - 30) : i])
        assert hook.threshold() == (pytest.approx(want) if want else None)
        got.append(want is not None and loss > want)
        ctx.metrics = {"loss": float(loss)}
        hook.on_step(ctx)
    assert 0 < sum(got) < 60
    assert hook.spikes == sum(a and not b for a, b in zip(got, [False, *got], strict=False))


def test_one_event_for_a_spike_and_one_when_it_is_over():
    losses = [5.0] * 10 + [4.0] * 30 + [6.0, 7.0, 5.0] + [4.0] * 30
    events, metrics = feed(LossSpike(), losses)
    assert [(e["event"], e.get("kind"), e["step"]) for e in events] == [("guard", "loss-spike", 41), ("notice", None, 44)]
    assert events[0]["threshold"] == pytest.approx(4 * 1.06)
    assert "3 steps" in events[1]["text"]
    assert [i + 1 for i, m in enumerate(metrics) if m["loss_spike"]] == [41, 42, 43]
    assert metrics[-1]["loss_spikes"] == 1


def test_nothing_during_the_warmup_and_on_a_falling_curve():
    assert feed(LossSpike(), list(np.linspace(9, 3, 100)))[0] == []
    spiky = [4.0] * 10 + [9.0] + [4.0] * 8
    assert not [e for e in feed(LossSpike(), spiky, steps=1000)[0] if e.get("kind") == "loss-spike"]


def test_divergence_is_said_once_and_stops_after_its_event():
    losses = [4.0] * 40 + [9.0] * 60
    events, _ = feed(LossSpike(), losses)
    said = [e for e in events if e.get("kind") == "diverged"]
    assert len(said) == 1
    assert said[0]["action"] == "warn"
    stopping = LossSpike(action="stop")
    run = tiny(stopping, steps=100)
    stopping.on_start(run.context)
    with pytest.raises(MetierError, match="diverged"):
        for loss in losses:
            run.context.metrics = {"loss": loss}
            stopping.on_step(run.context)
    assert run.events[-1]["kind"] == "diverged"
    assert run.events[-1]["action"] == "stop"


def test_state_is_json_and_complete():
    import json

    hook = LossSpike(window=5, warmup=2)
    feed(hook, [4, 4, 4, 9, 9], steps=50)
    other = LossSpike(window=5, warmup=2)
    other.load_state_dict(json.loads(json.dumps(hook.state_dict())))
    assert other.state_dict() == hook.state_dict()
    assert other.threshold() == hook.threshold()


def test_a_real_run_at_an_absurd_rate(tmp_path):
    from metier.core.api import train

    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "the number {i} is not {i + 1}."}}\n' for i in range(200)))
    settings = {
        "model": "lab/llama-50k", "data": {"train": str(tmp_path / "a.jsonl")}, "optimizer": {"adamw": {"lr": 3e-2}},
        "train": {"steps": 30, "batch": 4, "on_nonfinite": "skip"},
        "hooks": [{"loss-spike": {"warmup": 5, "action": "stop"}}],
    }  # fmt: skip
    calm = train(settings, out=tmp_path / "calm", quiet=True, handle_signals=False)
    assert calm.status == "done"
    assert "loss_spikes" in calm.metrics
    settings["optimizer"] = {"adamw": {"lr": 30.0}}
    with pytest.raises(MetierError, match="diverged"):
        train(settings, out=tmp_path / "wild", quiet=True, handle_signals=False)
