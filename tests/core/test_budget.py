"""Equal budgets: whatever a run is given to spend, exactly that length is left in its file."""

import pytest

from metier.core import budget, models
from metier.core.api import train
from metier.core.budget import apply_budget, step_flops, step_seconds

RUN = {
    "model": "lab/llama-50k",
    "data": {"train": "lab/pydoc", "limit": 12, "chunk": True, "max_length": 32, "eval_fraction": 0.2, "eval_limit": 4},
    "optimizer": {"adamw": {"lr": 1e-2}},
    "train": {"steps": 3, "batch": 4},
}
LENGTHS = {"steps", "epochs", "tokens"}


def with_train(**train):
    return {**RUN, "train": train}


def test_no_budget_leaves_the_run_as_it_is():
    changed = apply_budget(RUN, {})
    assert changed == RUN
    changed["train"]["steps"] = 99
    assert RUN["train"]["steps"] == 3


@pytest.mark.parametrize("length", [{"steps": 3}, {"epochs": 1.0}, {"tokens": 50}, {}])
@pytest.mark.parametrize("kind", ["tokens", "flops", "seconds"])
def test_exactly_one_length_remains(monkeypatch, kind, length):
    monkeypatch.setattr(budget, "step_flops", lambda run: 100.0)
    monkeypatch.setattr(budget, "step_seconds", lambda run: 0.5)
    given = with_train(batch=4, **length)
    changed = apply_budget(given, {kind: 1234.0})
    assert len(LENGTHS & set(changed["train"])) == 1
    assert changed["train"]["batch"] == 4
    assert given == with_train(batch=4, **length)
    expected = {"tokens": ("tokens", 1234), "flops": ("steps", 12), "seconds": ("steps", 2468)}[kind]
    assert changed["train"][expected[0]] == expected[1]


def test_tokens_are_spent():
    done = train(apply_budget(RUN, {"tokens": 5 * 4 * 32}), quiet=True, out=None, keep_weights=False)
    assert done.step == 5
    assert [e["tokens"] for e in done.events if e["event"] == "step"][-1] == 640


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# --- FLOPs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lab/llama-50k", "lab/llama-300k"])
def test_flops_of_a_step_against_a_count_by_hand(name):
    """6 N T for the matrices (2 forward, 4 backward), and 12 T² D per sequence and block for attention.

    Forward has two products of 2 T² D each; backward has five, because the scores are computed again.
    Of the output layer only the positions that carry loss are computed: T - 1 of T.
    """
    length, batch = 32, 4
    model = models.load(name).model
    c = model.config
    inner = sum(p.numel() for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n)
    head = c.vocab_size * c.hidden_size
    matrices = 6 * batch * (inner * length + head * (length - 1))
    attention = (2 + 5) * 2 * length**2 * c.hidden_size * c.num_hidden_layers * batch
    measured = step_flops({**RUN, "model": name})
    assert measured == pytest.approx(matrices + attention, rel=0.02)
    assert measured > matrices


def test_flops_follow_the_batch_and_not_its_split():
    whole = step_flops(RUN)
    assert step_flops(with_train(steps=3, batch=4, micro_batch=1)) == pytest.approx(whole, rel=1e-3)
    assert step_flops(with_train(steps=3, batch=8)) == pytest.approx(2 * whole, rel=1e-3)


@pytest.mark.parametrize("length", [{"epochs": 2.0}, {"tokens": 1}, {"steps": 3, "max_seconds": 1e-9, "log_every": 50}])
def test_a_probe_does_not_depend_on_the_length_of_the_run(length):
    """It replaces the length, and ignores what would end the run early or log too little."""
    run = with_train(batch=4, **length)
    assert step_flops(run) == step_flops(RUN)
    assert step_seconds(run) > 0


# --- seconds --------------------------------------------------------------------------------------------------


def test_seconds_are_the_median_of_the_steps_after_the_first(monkeypatch):
    events = [{"event": "step", "step": i + 1, "seconds": s} for i, s in enumerate([9.0, 0.1, 0.3, 0.2, 5.0, 0.2])]

    class Done:
        pass

    Done.events = [{"event": "notice", "text": "…"}, *events, {"event": "eval", "step": 6, "seconds": 100.0}]
    monkeypatch.setattr(budget, "_probe", lambda run, steps: Done)
    assert step_seconds(RUN) == 0.2
    assert apply_budget(RUN, {"seconds": 3.0})["train"] == {"batch": 4, "steps": 15}
    assert apply_budget(RUN, {"seconds": 0.01})["train"]["steps"] == 1


def test_seconds_come_from_the_clock_of_the_loop(monkeypatch):
    from metier.core import loop

    class Clock:
        now = 0.0

        @classmethod
        def monotonic(cls):
            cls.now += 0.25
            return cls.now

    monkeypatch.setattr(loop, "time", Clock)
    assert step_seconds(RUN) == pytest.approx(0.25)


# --- no trace -------------------------------------------------------------------------------------------------


def test_a_probe_leaves_no_trace_and_calls_no_tracker(tmp_path):
    step_flops({**RUN, "sinks": ["tensorboard"], "out": str(tmp_path / "run")})
    assert list(tmp_path.iterdir()) == []
    assert RUN["train"] == {"steps": 3, "batch": 4}
