"""A comparison end to end at the smallest size: equal budgets, paired data, failures that count, interruptions that continue."""

import json
from pathlib import Path

import pytest

from metier.compare import run as runner
from metier.compare.api import compare
from metier.compare.jobs import execute
from metier.compare.pool import run_jobs
from metier.compare.verdict import judge

DESIGN = {
    "name": "small",
    "run": {
        "model": "lab/llama-50k",
        "data": {"train": "lab/pydoc", "limit": 12, "chunk": True, "max_length": 32, "eval_fraction": 0.2, "eval_limit": 4},
        "schedule": "constant",
        "train": {"batch": 4},
    },
    "control": "slow",
    "arms": {"slow": {"optimizer": {"adamw": {"lr": 1e-4}}}, "fast": {"optimizer": {"adamw": {"lr": 1e-2}}}},
    "budget": {"tokens": 1280},
    "tune": {"factors": [0.5, 1.0], "fraction": 0.5},
    "seeds": 2,
    "parallel": 1,
}


def in_process(monkeypatch, wrap=execute):
    """Jobs run here instead of in worker processes, so that a test can break them."""

    def jobs(todo, *, parallel, crashed):
        for job in todo:
            yield job, wrap(job)

    monkeypatch.setattr(runner, "run_jobs", jobs)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("comparison")
    patch = pytest.MonkeyPatch()
    in_process(patch)
    result, _ = compare(DESIGN, out=folder, quiet=True)
    patch.undo()
    return result, folder


def finals(result):
    return [r for r in result.runs if r.trial is None]


def test_budget_and_tuning_are_equal(finished):
    result, _ = finished
    assert {r.tokens for r in finals(result)} == {1280}
    assert {len(t.values) for t in result.tuning} == {2}
    assert {r.tokens for r in result.runs if r.trial is not None} == {640}
    assert result.tuning[1].values == [0.005, 0.01]
    best = {t.arm: t.best for t in result.tuning}
    for r in finals(result):
        assert r.options == {"optimizer.lr": best[r.arm]}


def test_the_better_arm_is_better_and_costs_are_recorded(finished):
    result, _ = finished
    (verdict,) = judge(result)
    assert verdict.arm == "fast"
    assert verdict.effect < -0.1
    for r in finals(result):
        assert r.flops > 0
        assert r.peak_bytes > 0
        assert r.state_bytes == pytest.approx(2 * 4 * r.params, rel=0.01)
        assert r.curve.seconds == sorted(r.curve.seconds)


def test_arms_see_the_same_data_per_seed_and_other_data_for_other_seeds(tmp_path, monkeypatch):
    from metier.core.data.loader import Loader

    seen: dict[tuple, list] = {}
    make = Loader._make

    def spy(self, chosen):
        step = make(self, chosen)
        seen.setdefault(self.seed, []).append(step[0].ids)
        return step

    monkeypatch.setattr(Loader, "_make", spy)
    in_process(monkeypatch)
    compare({**DESIGN, "tune": None}, out=tmp_path, quiet=True)
    for orders in seen.values():
        half = len(orders) // 2
        assert orders[:half] == orders[half:]
    assert seen[0][0] != seen[1][0]


def test_an_interrupted_comparison_continues_without_running_anything_again(tmp_path, monkeypatch, finished):
    done = []

    def three_then_stop(job):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(job.label)
        return execute(job)

    in_process(monkeypatch, three_then_stop)
    with pytest.raises(KeyboardInterrupt):
        compare(DESIGN, out=tmp_path, quiet=True)
    again = []
    in_process(monkeypatch, lambda job: again.append(job.label) or execute(job))
    result, _ = compare(DESIGN, out=tmp_path, quiet=True)
    assert not set(done) & set(again)
    assert len(done) + len(again) == 8
    assert [r.metric for r in result.runs] == [r.metric for r in finished[0].runs]


def test_a_crash_and_a_divergence_are_results(tmp_path, monkeypatch):
    def broken(job):
        if job.arm == "fast" and job.seed == 1:
            return execute(job.model_copy(update={"run": {**job.run, "model": "lab/none"}}))
        if job.arm == "fast" and job.seed == 0:
            hot = {**job.run, "optimizer": {"sgd-momentum": {"lr": 1e30}}, "train": {**job.run["train"], "clip": None}}
            return execute(job.model_copy(update={"run": hot}))
        return execute(job)

    in_process(monkeypatch, broken)
    result, _ = compare({**DESIGN, "tune": None}, out=tmp_path, quiet=True)
    failed = {r.seed: r for r in finals(result) if r.arm == "fast"}
    assert failed[1].status == "crashed"
    assert "lab/none" in failed[1].error
    assert failed[0].status == "diverged"
    (verdict,) = judge(result)
    assert verdict.failed == 2
    assert verdict.effect > 0


def test_a_worker_that_dies_costs_its_job_only(tmp_path):
    design = {**DESIGN, "tune": None}
    jobs = [runner._job(runner.designs.load(design)[0], "slow", tmp_path, seed=s, value=None) for s in range(3)]
    gone = list(run_jobs(jobs, parallel=1, crashed=lambda j, why: runner._failed(j, "crashed", why, 0.0), run=_dies_on_seed_1))
    assert sorted(r.status for _, r in gone) == ["crashed", "done", "done"]


def _dies_on_seed_1(job):
    import os

    if job.seed == 1:
        os._exit(9)
    return execute(job)


@pytest.mark.slow
def test_on_ray(tmp_path, finished):
    """The same results from Ray's workers (extra: ray)."""
    pytest.importorskip("ray")
    result, _ = compare(DESIGN, out=tmp_path, on_ray=True, quiet=True)
    by_job = {(r.arm, r.seed, r.trial): r.metric for r in finished[0].runs}
    for r in result.runs:
        assert r.metric == pytest.approx(by_job[r.arm, r.seed, r.trial], abs=1e-4)


def test_the_folder_holds_each_result_and_no_weights(finished):
    _, folder = finished
    kept = list(Path(folder).rglob("result.json"))
    assert len(kept) == 8
    assert json.loads(kept[0].read_text())["result"]["status"] == "done"
    assert not list(Path(folder).rglob("*.safetensors"))
