"""Oracle of compare/search: which value a search tries next, worked out by hand; then the rule in a whole comparison."""

import json
import math
from types import SimpleNamespace

import fakes
import pytest

from metier.compare import design as designs
from metier.compare import leaderboard, report, search, table
from metier.compare import run as runner
from metier.compare.api import compare
from metier.compare.results import ComparisonResult, Curve, RunResult
from metier.core.errors import UsageError

NAN, INF = math.nan, math.inf
BENCH = {"run": {"model": "lab/llama-50k", "train": {"steps": 10}}, "control": "b",
         "arms": {"a": {"optimizer": {"adamw": {"lr": 1e-3}}}, "b": {"optimizer": {"adamw": {"lr": 0.1}}}}}  # fmt: skip


@pytest.mark.parametrize(("values", "metric", "lower", "expected"), [
    # The best at the upper edge, at the lower edge, inside; both directions of better.
    ([0.3, 1.0, 3.0], [5.0, 4.0, 3.0], True, 9.0),
    ([0.3, 1.0, 3.0], [3.0, 4.0, 5.0], True, 0.09),
    ([0.3, 1.0, 3.0], [5.0, 3.0, 4.0], True, None),
    ([0.3, 1.0, 3.0], [5.0, 4.0, 3.0], False, 0.09),
    ([0.3, 1.0, 3.0], [3.0, 4.0, 5.0], False, 9.0),
    ([0.3, 1.0, 3.0], [3.0, 5.0, 4.0], False, None),
    # The factor is the one at that end, and the end is by value, whatever the order of trying.
    ([1.0, 2.0, 10.0], [1.0, 2.0, 3.0], True, 0.5),
    ([1.0, 2.0, 10.0], [3.0, 2.0, 1.0], True, 50.0),
    ([3.0, 0.3, 1.0], [5.0, 3.0, 4.0], True, 0.09),
    ([3.0, 0.3, 1.0], [5.0, 4.0, 3.0], True, None),
    ([0.3, 1.0, 3.0, 9.0], [5.0, 4.0, 3.0, 2.0], True, 27.0),
    ([0.3, 1.0, 3.0, 9.0], [5.0, 4.0, 3.0, 3.5], True, None),
    ([0.3, 1.0, 3.0, 0.09], [3.0, 4.0, 5.0, 2.0], True, 0.027),
    # Trials that failed: the best one's outer neighbour diverged, so it is inside; an edge beside failures goes on.
    ([0.3, 1.0, 3.0], [5.0, 4.0, None], True, None),
    ([0.3, 1.0, 3.0], [None, 4.0, 5.0], True, None),
    ([0.3, 1.0, 3.0], [4.0, None, None], True, 0.09),
    ([0.3, 1.0, 3.0], [None, None, 4.0], False, 9.0),
    ([0.3, 1.0, 3.0], [5.0, 4.0, NAN], True, None),
    ([0.3, 1.0, 3.0], [5.0, 4.0, -INF], True, None),
    ([0.3, 1.0, 3.0], [4.0, 5.0, INF], False, None),
    ([0.3, 1.0, 3.0], [None, None, None], True, None),
    # Ties go to the value tried first: a further value that is only as good ends the search.
    ([0.3, 1.0, 3.0], [5.0, 4.0, 4.0], True, None),
    ([0.3, 1.0, 3.0], [4.0, 4.0, 5.0], True, 0.09),
    ([0.3, 1.0, 3.0, 9.0], [5.0, 4.0, 3.0, 3.0], True, None),
    ([0.3, 1.0, 3.0, 0.09], [4.0, 4.0, 5.0, 4.0], True, None),
    ([0.3, 1.0, 3.0], [-0.0, 0.0, 1.0], True, 0.09),
    # Nothing to go on by.
    ([1.0], [2.0], True, None),
    ([1.0, 1.0], [2.0, 3.0], True, None),
    ([0.0, 1.0], [3.0, 2.0], True, None),
    ([-1.0, 1.0], [3.0, 2.0], True, None),
    ([1e-300, 1.0], [2.0, 3.0], True, None),
])  # fmt: skip
def test_what_is_tried_next(values, metric, lower, expected):
    found = search.beyond(values, metric, lower_is_better=lower)
    assert found == (None if expected is None else pytest.approx(expected, rel=1e-5))


def test_the_best_is_the_first_of_equals_and_never_one_that_failed():
    assert search.best([2.0, 1.0, 1.0], lower_is_better=True) == 1
    assert search.best([2.0, 1.0, 2.0], lower_is_better=False) == 0
    assert search.best([None, NAN, 7.0, INF], lower_is_better=False) == 2
    assert search.best([None, NAN], lower_is_better=True) is None


# --- designs ------------------------------------------------------------------------------------------------


def test_a_grid_without_a_factor_cannot_be_widened():
    for factors in ([1.0], [2.0, 2.0]):
        with pytest.raises(UsageError, match="at least two different factors"):
            designs.load({**BENCH, "tune": {"factors": factors, "widen": 1}})
        assert designs.load({**BENCH, "tune": {"factors": factors}})[0].tune.widen == 0
    with pytest.raises(UsageError, match="widen"):
        designs.load({**BENCH, "tune": {"widen": -1}})


def test_a_search_around_zero_cannot_be_widened():
    arms = {"a": {"optimizer.lr": 0.0}, "b": {"optimizer.lr": 0.1}}
    design = designs.load({**BENCH, "run": {**BENCH["run"], "optimizer": {"adamw": {}}}, "arms": arms, "tune": {"widen": 1}})[0]
    with pytest.raises(UsageError, match=r"arm 'a' starts at optimizer\.lr 0"):
        designs.grid(design, "a", designs.run_document(design, "a"))


def test_the_line_before_the_start_says_how_many_runs_at_least_and_at_most():
    def line(**changes):
        return designs.budget_line(designs.load({**BENCH, "seeds": 2, **changes})[0])

    assert line(tune=None) == "2 arms with 2 seeds each: 4 runs"
    assert line() == "2 arms with 3 trials and 2 seeds each: 10 runs"
    goes_on = "at most 4 further for an arm whose best optimizer.lr is at an edge"
    assert line(tune={"widen": 4}) == f"2 arms with 3 trials and 2 seeds each, {goes_on}: 10 to 18 runs"


def test_objectives_are_widened_and_optimizers_as_their_leaderboard_was_made():
    widens = {kind: designs.shorthand([f"{kind}/*"]).tune.widen for kind in ("objective", "optimizer")}
    assert widens == {"objective": 4, "optimizer": 0}


# --- a whole comparison with made-up results ----------------------------------------------------------------


def made_up(job):
    """Arm a is best at lr 0.01 (three further values), arm b at ever higher ones; its final runs are worse."""
    lr = job.options["optimizer.lr"]
    metric = abs(math.log10(lr) + 2) if job.arm == "a" else 5 - math.log10(lr)
    empty = Curve(step=[], tokens=[], seconds=[], value=[])
    result = RunResult(
        arm=job.arm, seed=job.seed, trial=job.trial, options=job.options, metric=metric, status="done", error=None,
        curve=empty, eval_curve=None, seconds=1.0, tokens=10, flops=1.0, peak_bytes=1, state_bytes=1, params=1,
    )  # fmt: skip
    runner.write_json(runner.Path(job.folder) / "result.json", {"key": job.key, "result": result.model_dump(mode="json")})
    return result


def widened(monkeypatch, folder, cap, stop_after=None):
    """The comparison with ``widen: cap``, and the labels of what it ran; Ctrl-C after some runs."""
    ran = []

    def jobs(todo, *, parallel, crashed):
        assert parallel == 2
        begun = set()
        while len(begun) < len(todo):  # results arrive in any order, and what follows them is added
            job = next(j for j in reversed(todo) if j.key not in begun)
            begun.add(job.key)
            if len(ran) == stop_after:
                raise KeyboardInterrupt
            ran.append(job.label)
            yield job, made_up(job)

    monkeypatch.setattr(runner, "run_jobs", jobs)
    design = {**BENCH, "name": "wide", "seeds": 2, "parallel": 2, "tune": {"factors": [0.5, 1.0, 2.0], "widen": cap}}
    try:
        return compare(design, out=folder, quiet=True)[0], ran
    except KeyboardInterrupt:
        return None, ran


def test_every_arm_goes_on_until_its_best_is_inside_or_the_cap_is_reached(tmp_path, monkeypatch):
    result, ran = widened(monkeypatch, tmp_path, 5)
    a, b = result.tuning
    assert a.values == pytest.approx([0.0005, 0.001, 0.002, 0.004, 0.008, 0.016])
    assert (a.best, a.at_edge, a.planned, len(a.further), a.widen) == (0.008, False, 3, 3, 5)
    assert b.values == pytest.approx([0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4])
    assert (b.best, b.at_edge, len(b.further)) == (6.4, True, 5)
    assert len(ran) == len(set(ran)) == 6 + 3 + 5 + 4
    assert {r.options["optimizer.lr"] for r in result.finals("b")} == {6.4}
    assert result.notes == ["b: the best optimizer.lr (6.4) is at the edge of what was tried, after 5 further values"]


def test_without_widening_the_grid_is_all(tmp_path, monkeypatch):
    result, ran = widened(monkeypatch, tmp_path, 0)
    assert [len(t.values) for t in result.tuning] == [3, 3]
    assert result.notes == [
        "a: the best optimizer.lr (0.002) is at the edge of what was tried",
        "b: the best optimizer.lr (0.2) is at the edge of what was tried",
    ]
    assert len(ran) == 10


@pytest.mark.parametrize("stop_after", [2, 6, 9, 13, 15])
def test_an_interrupted_search_goes_on_and_a_higher_cap_keeps_what_was_tried(tmp_path, monkeypatch, stop_after):
    whole, all_runs = widened(monkeypatch, tmp_path / "whole", 5)
    _, first = widened(monkeypatch, tmp_path / "cut", 5, stop_after)
    result, rest = widened(monkeypatch, tmp_path / "cut", 5)
    assert sorted(first + rest) == sorted(all_runs)
    assert result.tuning == whole.tuning
    _, more = widened(monkeypatch, tmp_path / "cut", 6)
    assert sorted(more) == ["b seed 0", "b seed 1", "b trial 9"]


def test_what_was_tried_is_in_every_table(tmp_path, monkeypatch):
    result, _ = widened(monkeypatch, tmp_path, 5)
    rule = "starts with 3 values and goes on by the grid's factor, by at most 5 values, while its best is at an edge"
    assert leaderboard.columns(result)[-1] == "values tried"
    cells = {r[0]: r[-1] for r in leaderboard.rows(result)}
    assert cells == {"a": "6: 0.0005 to 0.016", "b (tuning at its edge)": "8: 0.05 to 6.4"}
    assert rule in leaderboard.caption(result)
    page = report.render(result)
    assert rule in page.replace("&#39;", "'")
    assert "3 trials per arm, up to 5 more" in page
    rows = report._tuned(result).rows
    assert [r[3:] for r in rows if r[0] == "a"] == [["grid", ""]] * 3 + [["further", ""], ["further", "best"], ["further", ""]]
    assert [r[3:] for r in rows if r[0] == "b"][-1] == ["further", "best (edge)"]
    kept = json.loads((tmp_path / "comparison.json").read_text())
    assert ComparisonResult.model_validate(kept).tuning == result.tuning


def test_the_page_of_leaderboards_is_built_from_old_and_new_records(tmp_path, monkeypatch):
    from metier.compare import check
    from metier.docsite import extra

    monkeypatch.setattr(check, "ROOT", tmp_path)
    result, _ = widened(monkeypatch, tmp_path / "run", 5)
    place = check.keep_leaderboard(result)
    new = extra.leaderboards(SimpleNamespace(root=tmp_path))
    assert "| b (tuning at its edge) |" in new
    assert "| 8: 0.05 to 6.4 |" in new
    data = json.loads(place.read_text())
    for t in data["tuning"]:
        del t["planned"], t["widen"]
    place.write_text(json.dumps(data))
    old = extra.leaderboards(SimpleNamespace(root=tmp_path))
    assert "values tried" not in old
    assert "| b (tuning at its edge) |" in old


def test_records_from_before_are_read_and_look_as_they_did():
    data = fakes.demo().model_dump(mode="json")
    for t in data["tuning"]:
        del t["planned"], t["widen"]
    old = ComparisonResult.model_validate(data)
    assert old.widen == 0
    assert [t.further for t in old.tuning] == [[]] * 4
    assert leaderboard.columns(old) == list(leaderboard.COLUMNS)
    assert report._tuned(old).columns == ["arm", "optimizer.lr", "eval_loss", "used"]
    assert table.searches(old) == "Every search tried 3 values."
