"""F1–F3: a run stopped anywhere and continued equals the run that was never stopped, bit for bit (P1)."""

import pytest
from runs import Labels, Pairs, assert_same, crash_after, go, outcome, rows, settings, stop_after, write_rows

from metier.core import log, part
from metier.core.data.examples import Crossed
from metier.core.lossmodule import TYPES, batch_type
from metier.core.part import listing
from metier.testing._sample import sample


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data") / "text.jsonl", rows())


def test_stopped_at_every_step_of_thirty(tmp_path, text):
    """F1: SIGTERM after step k, for every k; then the same command again."""
    run = settings(text, train__steps=30, train__eval_every=7, data__eval_fraction=0.2)
    go(tmp_path / "reference", run)
    expected = outcome(tmp_path / "reference")
    assert len(expected["events"]) == 30 + 5
    for k in range(30):
        folder = tmp_path / f"{k}"
        first = stop_after(k, folder, run)
        assert (first.status, first.step, first.signal) == ("interrupted", k, 15)
        assert not (folder / "model").exists()
        last = go(folder, run)
        assert (last.status, last.step) == ("done", 30)
        assert_same(outcome(folder), expected)


def test_crashed_at_every_step(tmp_path, text):
    """F1: no checkpoint at the crash, so the steps since the last one are done again."""
    run = settings(text, train__save_every=5, train__eval_every=5, data__eval_fraction=0.2)
    go(tmp_path / "reference", run)
    expected = outcome(tmp_path / "reference")
    for k in range(1, 13):
        folder = tmp_path / f"{k}"
        crash_after(k, folder, run)
        assert_same_after_crash(folder, run, expected, k)


def assert_same_after_crash(folder, run, expected, k):
    go(folder, run)
    assert_same(outcome(folder), expected)
    texts = [e["text"] for e in log.read(folder) if e["event"] == "notice"]
    # A checkpoint of step 5 is written after step 5 was logged, which is where the crash comes.
    saved = (k - 1) // 5 * 5
    assert any(f"continuing after step {saved}" in t for t in texts) == (saved > 0)


def test_stopped_again_and_again(tmp_path, text):
    run = settings(text)
    go(tmp_path / "reference", run)
    for k in (1, 2, 2, 5, 6, 11):
        stop_after(k, tmp_path / "run", run)
    go(tmp_path / "run", run)
    assert_same(outcome(tmp_path / "run"), outcome(tmp_path / "reference"))


def test_a_finished_run_started_again_changes_nothing(tmp_path, text):
    run = settings(text)
    go(tmp_path / "run", run)
    before = outcome(tmp_path / "run")
    again = go(tmp_path / "run", run)
    assert (again.status, again.step) == ("done", 12)
    assert_same(outcome(tmp_path / "run"), before)


DROPOUT = {"model": "lab/gpt2-1m", "adapter": {"lora": {"dropout": 0.3, "rank": 2, "targets": "all-linear"}}}
SOME = (0, 1, 3, 6)
"""Before anything, after the first step, within and at the end of an epoch of 24 examples (batch 4)."""
STREAM = {"data__source": {"mix": {"weights": {"a": 1.0, "b": 3.0}}}}
VARIANTS = {
    "dropout and adapter": DROPOUT,
    "accumulation": {"train__micro_batch": 2, "train__batch": 6},
    "two workers": {"train__workers": 2},
    "no shuffling": {"data__shuffle": False},
    "packed": {"data__packed": True},
    "chunked": {"data__chunk": True, "data__max_length": 16},
    "bf16 weights": {"dtype": "bf16"},
    "bf16 compute": {"train__precision": "bf16"},
    "gradient checkpointing": {"train__gradient_checkpointing": True},
    "epochs": {"train__steps": None, "train__epochs": 1.5, "data__eval_fraction": 0.1},
    "schedule with phases": {"schedule": {"wsd": {"warmup": 3}}},
    "stateful hook": {"hooks": ["ema"], "train__eval_every": 4, "data__eval_fraction": 0.2},
    "noise hook": {"hooks": ["neftune"]},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_steps_of_a_variant(tmp_path, text, name):
    """F2."""
    check_steps(tmp_path, settings(text, **{"train__steps": 8, **VARIANTS[name]}), SOME)


def test_every_step_of_a_stream(tmp_path, text):
    """F2: a source that mixes two inputs."""
    other = write_rows(tmp_path / "other.jsonl", rows(count=7, seed=5))
    run = settings(text, train__steps=8, data__train={"a": str(text), "b": str(other)}, **STREAM)
    check_steps(tmp_path, run, range(8))


def check_steps(tmp_path, run, steps):
    run["train"] = {k: v for k, v in run["train"].items() if v is not None}
    go(tmp_path / "reference", run)
    expected = outcome(tmp_path / "reference")
    for k in steps:
        stop_after(k, tmp_path / f"{k}", run)
        go(tmp_path / f"{k}", run)
        assert_same(outcome(tmp_path / f"{k}"), expected)


@pytest.mark.parametrize("name", [p.name for p in listing() if p.kind == "optimizer"])
def test_every_optimizer(tmp_path, text, name):
    """F3: stop at 5, then 5 more; a rule with hidden state fails here."""
    options = sample(f"optimizer/{name}").options
    check_steps(tmp_path, settings(text, train__steps=10, optimizer={name: dict(options)}), [5])


@pytest.mark.parametrize("name", [p.name for p in listing() if p.kind == "objective"])
def test_every_objective(tmp_path, name):
    """F3."""
    built = sample(f"objective/{name}")
    reads = batch_type(built.obj)
    assert reads in TYPES
    made = rows(reads)
    if reads is Pairs:  # what some of them need besides
        made = [{**r, "margin": 0.5 + i % 3, "samples": ["one two", f"three {i}"]} for i, r in enumerate(made)]
    if getattr(part.load(f"objective/{name}"), "takes", None) == (Crossed,):
        made = [{"prompts": [f"a {i}", f"b {i}"], "completions": [f"c {i}", "d e"]} for i in range(len(made))]
    data = write_rows(tmp_path / "data.jsonl", made)
    changes = {"adapter": "lora"} if "adapter" in built.card.needs else {}
    run = settings(data, train__steps=10, objective={name: dict(built.options)}, **changes)
    check_steps(tmp_path, run, [5])


def test_the_rows_helper_knows_the_formats():
    assert set(rows(Pairs, 1)[0]) == {"prompt", "chosen", "rejected"}
    assert set(rows(Labels, 1)[0]) == {"text", "label"}
