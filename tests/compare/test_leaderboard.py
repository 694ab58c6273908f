"""Oracle of compare/leaderboard: places and crossings computed by hand."""

import json

import pytest
from fakes import comparison

from metier.compare import leaderboard
from metier.compare.results import Curve


def with_curves(result, curves):
    """Evaluations at 10, 20, 30 steps of 1000 tokens and 0.1 s; every seed of an arm the same curve plus its offset."""
    for r in result.runs:
        if r.trial is None:
            values = [v + 0.1 * (1 if r.seed else -1) for v in curves[r.arm]]
            r.eval_curve = Curve(step=[10, 20, 30], tokens=[10_000, 20_000, 30_000], seconds=[1.0, 2.0, 3.0], value=values)
    return result


@pytest.fixture
def result():
    made = comparison({"fast": [1.9, 2.1], "slow": [2.9, 3.1], "base": [2.4, 2.6]}, control="base")
    return with_curves(made, {"fast": [3.5, 2.5, 2.0], "slow": [4.0, 3.5, 3.0], "base": [4.0, 3.0, 2.5]})


def test_arms_are_ranked_by_the_metric(result):
    assert [p.arm for p in leaderboard.places(result)] == ["fast", "base", "slow"]


def test_the_target_is_where_the_control_ends_and_is_crossed_between_evaluations(result):
    assert leaderboard.target(result) == pytest.approx(2.5)
    found = {p.arm: p for p in leaderboard.places(result)}
    assert found["fast"].tokens == pytest.approx(20_000)
    assert found["fast"].seconds == pytest.approx(2.0)
    assert found["base"].tokens == pytest.approx(30_000)  # the control reaches its own target at its end
    assert found["slow"].tokens is None


def test_a_crossing_between_two_evaluations_is_interpolated(result):
    with_curves(result, {"fast": [3.5, 2.1, 2.0], "slow": [4.0, 3.5, 3.0], "base": [4.0, 3.0, 2.5]})
    fast = next(p for p in leaderboard.places(result) if p.arm == "fast")
    assert fast.tokens == pytest.approx(10_000 + 10_000 * (3.5 - 2.5) / (3.5 - 2.1))


def test_an_arm_with_a_failed_seed_does_not_reach_the_target():
    made = comparison({"wild": [1.0, None], "base": [2.4, 2.6]}, control="base")
    wild = next(p for p in leaderboard.places(made) if p.arm == "wild")
    assert wild.tokens is None
    assert "1/2 failed" in wild.final


def test_higher_can_be_better():
    made = comparison({"good": [0.9, 0.9], "base": [0.5, 0.5]}, control="base")
    made.lower_is_better = False
    with_curves(made, {"good": [0.4, 0.6, 0.9], "base": [0.2, 0.3, 0.5]})
    assert [p.arm for p in leaderboard.places(made)] == ["good", "base"]
    assert leaderboard.places(made)[0].tokens == pytest.approx(15_000)


def test_the_tables_have_a_row_for_every_arm(result):
    text = leaderboard.markdown(result).splitlines()
    assert len(text) == 5
    assert all(line.count("|") == 7 for line in text)
    assert "not reached" in leaderboard.plain(result)
    assert "2.5000" in leaderboard.caption(result)


def test_what_is_kept_gives_the_same_table_without_the_curves_of_trials(result, tmp_path, monkeypatch):
    from metier.compare import check
    from metier.docsite.facts import read_result

    monkeypatch.setattr(check, "ROOT", tmp_path)
    result.runs.append(result.runs[0].model_copy(update={"trial": 0}))
    data = json.loads(check.keep_leaderboard(result).read_bytes())
    assert leaderboard.rows(read_result(data)) == leaderboard.rows(result)
    assert all(not r["curve"]["step"] for r in data["runs"] if r["trial"] is not None)


def test_further_metrics_replace_the_race_to_a_target(result):
    for r in result.runs:
        r.also = {"answer_kl": 1.0 + r.seed, "answer_length": None}
    assert leaderboard.columns(result) == ["arm", "eval loss", "answer kl", "answer length"]
    first = leaderboard.rows(result)[0]
    seeds = [r.seed for r in result.finals("fast")]
    assert first[0] == "fast"
    assert float(first[2]) == pytest.approx(1 + sum(seeds) / len(seeds), rel=1e-2)
    assert first[3] == "–"
