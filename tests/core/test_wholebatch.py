"""Losses of a whole step: what is evaluated only has no slopes, and the same values as what is trained on.

Bugs it is meant to catch: a graph built in an evaluation, a loss of held-out rows that differs from that of a training step,
metrics averaged over parts, an objective that learns from held-out rows.
"""

import json

import numpy as np
import pytest
import torch

from metier.core import aux, config, models, part
from metier.core.loop import Loop
from metier.core.session import open_session
from metier.core.wholebatch import policy, whole, whole_value
from metier.testing import objective as suite

WHOLE = ["alpha-dpo", "aot", "aot-unpaired", "bco", "beta-dpo", "dr-dpo", "kto", "spa", {"label-smoothing": {"of": "dr-dpo"}}]
STATEFUL = ["alpha-dpo", "bco", "beta-dpo"]


def name(ref):
    return ref if isinstance(ref, str) else next(iter(ref))


def open_run(objective, folder, micro=3):
    rng = np.random.default_rng(0)
    words = lambda: " ".join(rng.choice(["alpha", "beta", "gamma", "for", "x"], rng.integers(1, 9)))
    rows = [{"prompt": words(), "chosen": words(), "rejected": words() + "."} for _ in range(24)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    data = {"train": str(folder / "rows.jsonl"), "max_length": 64, "eval_fraction": 0.4}
    run = {
        "model": "lab/llama-50k",
        "objective": objective,
        "data": data,
        "train": {"steps": 2, "batch": 4, "micro_batch": micro},
    }
    return open_session(*config.load(run), folder / "run", quiet=True, handle_signals=False)


def slopes_too(inner, layouts):
    """The held-out loss as a training step computes it."""
    with torch.no_grad():
        found = whole(inner.loss, [inner(x, scores_only=True) for x in layouts], lambda mine: [mine], 0)
    return {f"eval_{k}": float(v) / found.units for k, v in {"loss": found.total, **found.metrics}.items()}


@pytest.mark.parametrize("objective", WHOLE, ids=name)
def test_an_evaluation_computes_values_only(tmp_path, objective):
    with open_run(objective, tmp_path) as session:
        loop, calls = Loop(session), []
        assert "batch" in loop.inner.needs
        assert len(session.eval_layouts) > 1
        original = loop.inner.loss

        def spied(batch):
            result = original(batch)
            values, metrics = result
            tensors = [*policy(batch).values(), values, *metrics.values()]
            calls.append((torch.is_grad_enabled(), any(t.requires_grad for t in tensors)))
            return result

        session.context.model.eval()
        expected = slopes_too(loop.inner, session.eval_layouts)
        loop.inner.loss = spied
        assert loop.evaluate() == expected
    assert calls == [(False, False)]


@pytest.mark.parametrize("objective", WHOLE, ids=name)
def test_values_in_parts_are_those_of_a_training_step(objective):
    """On synthetic scores of different parts, where every metric counts by its units."""
    built = part.build("objective", objective)
    case = suite.Case(built.obj, suite.batch_type(built.obj), built.needs)
    batch = case.batch()
    parts = [batch, batch]
    total, units, metrics = whole_value(built.obj, parts)
    found = whole(built.obj, parts, lambda mine: [mine], 0)
    assert (float(total), units) == (float(found.total), found.units)
    assert {k: float(v) for k, v in metrics.items()} == {k: float(v) for k, v in found.metrics.items()}
    assert not total.requires_grad
    assert found.slopes


@pytest.mark.parametrize("objective", STATEFUL)
def test_nothing_is_learnt_from_held_out_rows(tmp_path, objective):
    """Not before the first step either, when an objective has not seen a training step yet."""
    with open_run(objective, tmp_path) as session:
        loop = Loop(session)
        state = loop.inner.objective.obj.state_dict
        before = json.dumps(state())
        first, second = loop.evaluate(), loop.evaluate()
        assert json.dumps(state()) == before
        assert first == second


@pytest.mark.parametrize("micro", [4, 3])
def test_what_modules_add_is_in_the_reported_loss(tmp_path, micro):
    """16 = the squares of 16 ones, whether the step is computed at once or in two parts."""

    def losses(folder, extra):
        folder.mkdir()
        with open_run("kto", folder, micro) as session:
            block = models.blocks(session.context.model)[0]
            if extra:
                block.register_forward_hook(lambda m, *_: aux.add("extra", m.input_layernorm.weight.square().sum()))
            return [e["loss"] for e in session.train(keep_weights=False).events if e["event"] == "step"]

    with_extra, plain = losses(tmp_path / "a", True), losses(tmp_path / "b", False)
    assert with_extra[0] - plain[0] == pytest.approx(16.0, abs=1e-5)
