"""hook/tr-dpo: after every update the reference is the stated mixture of weights, with and without an adapter, also after a resume.

Bugs it is meant to catch: a reference that does not move or moves too early, shares exchanged, a twin that shares trainable
weights with the model, adapters of the twin left off, an interrupted run that starts with the initial reference again.
"""

import json

import pytest
import torch

from metier import train
from metier.core import config, session
from metier.core.errors import UsageError

STEPS = 6


def run_file(tmp_path, hooks, **more):
    data = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"p {i % 5}", "chosen": "a b " * (i % 3 + 1), "rejected": f"c {i}"} for i in range(24)]
    data.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return {
        "model": "lab/llama-50k", "objective": "dpo", "data": {"train": str(data)}, "optimizer": {"adamw": {"lr": 1e-2}},
        "schedule": "constant", "hooks": hooks, "train": {"steps": STEPS, "batch": 6}, **more,
    }  # fmt: skip


class Watch:
    """Weights of model and reference after every step."""

    def __init__(self):
        self.own, self.theirs = [], []

    def on_step(self, ctx):
        self.own.append({n: p.detach().clone() for n, p in ctx.trainable()})
        self.theirs.append({n: t.clone() for n, t in ctx.reference.state_dict().items()})


def watched(run, folder):
    parsed, document = config.load(run)
    watch = Watch()
    with session.open_session(parsed, document, folder, quiet=True, handle_signals=False) as s:
        start = {n: p.detach().clone() for n, p in s.context.trainable()}
        s.listeners.append(watch)
        s.train(keep_weights=False)
    return start, watch


@pytest.mark.parametrize("more", [{}, {"adapter": "lora"}], ids=["full", "adapter"])
@pytest.mark.parametrize(("share", "every"), [(0.6, 1), (1.0, 2), (0.25, 3)])
def test_the_reference_is_the_stated_mixture(tmp_path, share, every, more):
    expected, watch = watched(run_file(tmp_path, [{"tr-dpo": {"share": share, "every": every}}], **more), tmp_path / "run")
    for t in range(STEPS):
        if (t + 1) % every == 0:
            expected = {n: share * watch.own[t][n] + (1 - share) * expected[n] for n in expected}
        for n in expected:
            torch.testing.assert_close(watch.theirs[t][n], expected[n], rtol=1e-5, atol=1e-7)
    assert any((expected[n] != watch.own[0][n]).any() for n in expected)


@pytest.mark.parametrize("more", [{}, {"adapter": "lora"}], ids=["full", "adapter"])
def test_a_copy_in_every_step_has_margin_zero(tmp_path, more):
    """With a hard update after every step π equals μ at each loss: log 2, which a reference that stays behind does not give."""
    moved = train(run_file(tmp_path, [{"tr-dpo": {"share": 1.0, "every": 1}}], **more), out=tmp_path / "a", quiet=True)
    still = train(run_file(tmp_path, [{"tr-dpo": {"share": 0.0, "every": 1}}], **more), out=tmp_path / "b", quiet=True)
    plain = train(run_file(tmp_path, [], **more), out=tmp_path / "c", quiet=True)
    losses = [[e["loss"] for e in r.events if e["event"] == "step"] for r in (moved, still, plain)]
    assert losses[0] == pytest.approx([0.693147] * STEPS, abs=1e-5)
    assert losses[1] == pytest.approx(losses[2], abs=1e-5)
    assert abs(losses[2][-1] - 0.693147) > 1e-3


def test_a_resumed_run_keeps_its_reference(tmp_path):
    run = run_file(tmp_path, [{"tr-dpo": {"share": 0.5, "every": 2}}])
    whole = train(run, out=tmp_path / "whole", quiet=True)
    train({**run, "train": {**run["train"], "steps": 3}}, out=tmp_path / "parts", quiet=True)
    rest = train(run, out=tmp_path / "parts", quiet=True)
    assert rest.metrics["loss"] == pytest.approx(whole.metrics["loss"], abs=1e-6)


def test_where_it_would_do_nothing_it_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("METIER_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UsageError, match="cached"):
        train(run_file(tmp_path, ["tr-dpo"], reference_scores="cached"), out=tmp_path / "a", quiet=True)
    with pytest.raises(UsageError, match="does not use"):
        train(run_file(tmp_path, ["tr-dpo"], objective="simpo"), out=tmp_path / "b", quiet=True)
