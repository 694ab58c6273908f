"""What studies of self-training share, and their runs: one gold reward, equal budgets, choices on prompts of their own.

Bugs it is meant to catch: tuning on what is reported, a gold reward of the judge that is not the reported one, runs that end early
unnoticed, refinement that is never switched on, ends of a sweep that nobody is told of.
"""

import math

import pytest

from metier.compare.study import Study
from metier.core import part
from metier.core.errors import MetierError
from metier.lab import preferencebench, words
from metier.studies import _alma_components as components
from metier.studies import _principles as principles
from metier.studies import _self_training as own
from metier.studies import _spa_rounds as spa

PRAISE = "kind bright clever gentle honest wise"
"""Words of praise in no clause about the topic: worth much by the lexicon and nothing as an answer."""


def test_one_gold_reward(tmp_path):
    prompt = words.prompts(1)[0]
    assert words.lexicon(prompt, PRAISE) > 1
    assert own.gaps([{"prompt": prompt, "chosen": PRAISE, "rejected": "it"}]) == pytest.approx([0.0])
    judge = part.build("reward", own.judge(tmp_path)).obj
    assert float(judge([prompt], [[PRAISE]], None)[0][0]) == words.quality(prompt, PRAISE)
    assert "lexicon" not in components.NOISY


def test_choices_are_made_on_other_prompts_and_random_numbers(monkeypatch):
    calls = []
    monkeypatch.setattr(
        preferencebench, "measure", lambda tuned, base, prompts, **how: calls.append((prompts, how["seed"])) or {}
    )
    own.measured(None, None)
    own.measured(None, None, choosing=True)
    (final, seed), (tuning, other) = calls
    assert not set(final) & set(tuning)
    assert len(tuning) == len(final) == 128
    assert seed != other


def test_principles_are_tuned_on_queries_of_their_own(tmp_path):
    bench = principles.Bench(Study(tmp_path))
    single, double = bench.asked(128)
    assert len(set(bench.choosing())) == 64
    assert not {principles.query(p) for p in bench.choosing()} & {principles.query(p) for p in (*single, *double)}
    assert principles.query("praise fox today politely firmly ?") == "praise fox today"
    assert all(sum(w in words.CONTROLS for w in p.split()) == 1 for p in bench.choosing())


def test_best_of_and_its_notes():
    scores = {1.0: math.nan, 2.0: 0.5, 3.0: 0.4}
    best, table = own.best_of((1.0, 2.0, 3.0), scores.__getitem__)
    assert best == 2.0
    assert own.best_of((1.0, 2.0), lambda _: math.nan)[0] == 1.0
    assert own.notes({"a": 2.0}, {"a": table}) == []
    (note,) = own.notes({"a": 3.0, "b": 1.0, "c": 2.0}, {"a": table, "b": table, "c": table})
    assert "a: lr = 3 (largest)" in note
    assert "b: lr = 1 (smallest)" in note
    assert "c:" not in note


def test_a_run_that_ends_early_is_an_error(tmp_path):
    rows = [{"prompt": p} for p in words.prompts(8)]
    run = {
        "model": own.MODEL, "objective": "dpo", **own.settings(1e-4, 9, 4, 0),
        "data": {"train": own.written(tmp_path / "p.jsonl", rows), "max_length": 64, "source": {"spa": {"max_new_tokens": 24}}},
        "reference": "lab/words-120k",
    }  # fmt: skip
    with pytest.raises(MetierError, match=r"the run short ended after \d of 9 steps"):
        own.trained(Study(tmp_path), "short", run)


def test_rounds_of_spa(tmp_path):
    """Both rounds have exactly their pairs and steps, from the model before; refinement is on; too few pairs are an error."""
    bench = spa.Bench(Study(tmp_path), 60)
    second = bench.arm("gold", 0, 1e-4, 2)
    first = bench.run_file("gold", 0, 1e-4, 1)
    run = bench.run_file("gold", 0, 1e-4, 2)
    assert run["train"]["steps"] == 2
    assert "reference" not in run  # of training, which then is the model at the start
    assert run["model"] == str(tmp_path / "gold-0-0.0001-1" / "model")
    assert first["data"]["train"] != run["data"]["train"]
    rows = own.read(run["data"]["train"])
    assert len(rows) == 60
    assert (own.gaps(rows) > 0).all()
    assert (second / "model").is_dir()
    asked = [{r["prompt"] for r in own.read(tmp_path / f"prompts-0-{n}.jsonl")} for n in (1, 2)]
    assert asked[0] != asked[1]
    labels = bench.labels(0, 1e-4)
    assert 0 < labels["share_softened"] <= labels["share_doubted"] < 0.5


def test_too_few_pairs_are_repeated_and_named(tmp_path, monkeypatch):
    rows = [{"prompt": "a", "chosen": f"b{i}", "rejected": "c"} for i in range(59)]
    monkeypatch.setattr(own, "trained", lambda study, name, run: tmp_path)
    monkeypatch.setattr(own, "made_rows", lambda folder, round: rows)
    bench = spa.Bench(Study(tmp_path), 60)
    assert own.read(bench.made("gold", 0, tmp_path, "pairs", 1)) == [*rows, rows[0]]
    assert bench.few == {"gold, seed 0, round 1": 59}


def test_pairs_that_fill_no_batch_are_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(own, "trained", lambda study, name, run: tmp_path)
    monkeypatch.setattr(own, "made_rows", lambda folder, round: [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 29)
    bench = spa.Bench(Study(tmp_path), 60)
    with pytest.raises(MetierError, match="29 pairs do not fill a batch"):
        bench.made("gold", 0, tmp_path, "pairs", 1)
    assert math.isnan(bench.score("gold", 1e-4))
