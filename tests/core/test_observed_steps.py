"""A step whose scores are not finite, which the guard skips, leaves no trace in an objective's running means.

Bugs it is meant to catch: one NaN that stays in a mean for ever, so that `on_nonfinite: skip` cannot go on.
"""

import json

import numpy as np
import pytest

from metier.core import config
from metier.core.lossmodule import LossModule
from metier.core.session import open_session


@pytest.mark.parametrize("objective", ["bco", "alpha-dpo", "beta-dpo", "spa"])
def test_a_skipped_step_is_not_observed(tmp_path, monkeypatch, objective):
    rng = np.random.default_rng(0)
    words = lambda: " ".join(rng.choice(["alpha", "beta", "gamma"], rng.integers(1, 9)))
    rows = [{"prompt": words(), "chosen": words(), "rejected": words() + "."} for _ in range(24)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    train = {"steps": 3, "batch": 4, "micro_batch": 2, "on_nonfinite": "skip"}
    run = {
        "model": "lab/llama-50k",
        "objective": objective,
        "data": {"train": str(tmp_path / "rows.jsonl"), "max_length": 64, "eval_fraction": 0.2},
        "train": train,
    }
    original, calls = LossModule.score, []

    def once_nan(self, layout, **overrides):
        b = original(self, layout, **overrides)
        calls.append(1)
        if len(calls) in (1, 3):  # the first micro-batch of the first step, in both passes
            getattr(b, "logps" if hasattr(b, "logps") else "chosen_logps").data[0] = float("nan")
        return b

    monkeypatch.setattr(LossModule, "score", once_nan)
    with open_session(*config.load(run), tmp_path / "run", quiet=True, handle_signals=False) as session:
        session.train(keep_weights=False)
        state = json.dumps(session.resolved.objective.built.obj.state_dict())
    events = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [e["action"] for e in events if e["event"] == "guard"] == ["skip"]
    assert "NaN" not in state
    assert any(c in "123456789" for c in state), "the other steps were observed"
