"""Run a comparison: tune every arm with the same number of trials, then train every arm on the same seeds."""

import time
from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

from metier.compare import design as designs
from metier.compare import search
from metier.compare.design import Design, Tune
from metier.compare.jobs import Job, _failed, stored
from metier.compare.pool import cores, run_jobs, run_jobs_on_ray
from metier.compare.results import Arm, Budget, ComparisonResult, RunResult, Tuning
from metier.core.runfolder import command_line, environment, write_json
from metier.core.yamlfile import set_path

TUNING_SEED = 1000
"""Trials use a seed of their own, so that the seeds of the final runs decide nothing about the tuning."""
Report = Callable[[Job, RunResult, int, int], None]


def run(design: Design, *, report: Report | None = None, on_ray: bool = False, folder: Path | None = None) -> ComparisonResult:
    """Execute a design and return its result; continues where an interrupted comparison stopped."""
    folder = folder or Path(design.out or Path("comparisons") / (design.name or "comparison"))
    folder.mkdir(parents=True, exist_ok=True)
    counter = _Counter(report, designs.jobs_count(design))
    tried = _search(design, folder, counter, on_ray) if design.tune else {}
    notes: list[str] = []
    tuning = [_tuning(design, design.tune, arm, tried[arm], notes) for arm in design.arms] if design.tune else []
    best = {t.arm: t.best for t in tuning}
    finals = [_job(design, arm, folder, seed=s, value=best.get(arm)) for s in range(design.seeds) for arm in design.arms]
    ran = counter.results(_execute(design, finals, on_ray))
    result = _result(design, tuning, [*(r for runs in tried.values() for r in runs), *ran], notes)
    write_json(folder / "comparison.json", result.model_dump(mode="json"))
    return result


class _Counter:
    def __init__(self, report: Report | None, total: int) -> None:
        self.report, self.total, self.done = report, total, 0

    def results(self, running: Generator[tuple[Job, RunResult]]) -> list[RunResult]:
        """All results, reported as they come; workers end with this call however it ends."""
        found = []
        with closing(running):
            for job, result in running:
                self.done += 1
                if self.report:
                    self.report(job, result, self.done, self.total)
                found.append(result)
        return found


def _search(design: Design, folder: Path, counter: _Counter, on_ray: bool) -> dict[str, list[RunResult]]:
    """Every arm's trials in the order of their index: the grid, then one further value at a time while one is due."""
    tune, found = design.tune, {arm: [] for arm in design.arms}
    assert tune is not None

    def following(result: RunResult) -> list[Job]:
        arm, runs = result.arm, found[result.arm]
        runs.append(result)
        runs.sort(key=lambda r: r.trial or 0)
        value = _beyond(design, tune, runs)
        if value is None:
            return []
        counter.total += 1
        return [_job(design, arm, folder, seed=TUNING_SEED, value=value, trial=len(runs))]

    counter.results(_execute(design, [j for arm in design.arms for j in _trials(design, arm, folder)], on_ray, following))
    return found


def _beyond(design: Design, tune: Tune, runs: list[RunResult]) -> float | None:
    """The next value of an arm's search: once the grid is done, if the best one lies at an edge and the cap allows it."""
    if not len(tune.factors) <= len(runs) < len(tune.factors) + tune.widen:
        return None
    values, metric = [r.options[tune.option] for r in runs], [r.metric for r in runs]
    return search.beyond(values, metric, lower_is_better=design.lower_is_better)


def _execute(
    design: Design, jobs: list[Job], on_ray: bool, following: Callable[[RunResult], list[Job]] = lambda result: []
) -> Generator[tuple[Job, RunResult]]:
    """Results of jobs, kept ones first; ``following`` says for each result what is to run because of it."""
    todo: list[Job] = []

    def kept(given: list[Job]) -> Generator[tuple[Job, RunResult]]:
        """The results that are there already; the other jobs become something to do."""
        queue = list(given)
        while queue:
            job = queue.pop(0)
            result = stored(job)
            if result is None:
                todo.append(job)
            else:
                yield job, result
                queue += following(result)

    yield from kept(jobs)
    # By all jobs, not those left to do: a run has the same number of threads in a comparison that continues.
    parallel = min(design.parallel or cores(), max(1, len(jobs)))
    local = {"parallel": parallel, "crashed": lambda j, why: _failed(j, "crashed", why, 0.0)}
    with closing(run_jobs_on_ray(todo) if on_ray else run_jobs(todo, **local)) as running:
        for job, result in running:
            yield job, result
            yield from kept(following(result))


def _trials(design: Design, arm: str, folder: Path) -> list[Job]:
    values = designs.grid(design, arm, designs.run_document(design, arm))
    return [_job(design, arm, folder, seed=TUNING_SEED, value=v, trial=i) for i, v in enumerate(values)]


def _job(design: Design, arm: str, folder: Path, *, seed: int, value: float | None, trial: int | None = None) -> Job:
    from metier.catalog.status import code_hash

    document = designs.run_document(design, arm)
    options: dict[str, Any] = {}
    if value is not None and design.tune:
        set_path(document, tuple(design.tune.option.split(".")), value, f"{design.tune.option}={value:g}")
        options[design.tune.option] = value
    document.data.setdefault("train", {})["seed"] = seed
    budget = {str(k): float(v) for k, v in design.budget.items()}
    if trial is not None and design.tune and design.tune.fraction != 1.0:
        budget = _shorten(document.data, budget, design.tune.fraction)
    name = f"{arm}/seed-{seed}" if trial is None else f"{arm}/trial-{trial}"
    return Job(
        arm=arm, seed=seed, trial=trial, run=document.data, options=options, metric=design.metric, also=design.also,
        budget=budget, code=code_hash(_sources(designs.part_refs(document.data))), folder=str(folder / "runs" / name),
    )  # fmt: skip


def _shorten(run: dict[str, Any], budget: dict[str, float], fraction: float) -> dict[str, float]:
    if budget:
        return {k: v * fraction for k, v in budget.items()}
    for key in ("steps", "tokens"):
        if run["train"].get(key):
            run["train"][key] = max(1, round(run["train"][key] * fraction))
    return budget


def _tuning(design: Design, tune: Tune, arm: str, runs: list[RunResult], notes: list[str]) -> Tuning:
    values, metric = [r.options[tune.option] for r in runs], [r.metric for r in runs]
    best = search.best(metric, lower_is_better=design.lower_is_better)
    found = Tuning(
        arm=arm, parameter=tune.option, values=values, metric=metric, best=values[best or 0],
        planned=len(tune.factors), widen=tune.widen,
    )  # fmt: skip
    if best is None:
        notes.append(f"{arm}: every trial failed, so the first value of {tune.option} is used")
    elif found.at_edge:
        further = f", after {len(found.further)} further values" if tune.widen else ""
        notes.append(f"{arm}: the best {tune.option} ({found.best:g}) is at the edge of what was tried{further}")
    return found


def _result(design: Design, tuning: list[Tuning], runs: Iterable[RunResult], notes: list[str]) -> ComparisonResult:
    runs = list(runs)
    if design.budget:
        ((kind, amount),) = design.budget.items()
    else:
        kind, amount = "tokens", float(max((r.tokens for r in runs if r.trial is None), default=0))
    return ComparisonResult(
        name=design.name or "comparison", question=design.question, metric=design.metric,
        lower_is_better=design.lower_is_better, budget=Budget(kind=kind, amount=amount),
        minimum_effect=design.minimum_effect,
        arms=[Arm(name=a, label=a, overrides=o, is_control=a == design.control) for a, o in design.arms.items()],
        seeds=list(range(design.seeds)), tuning=tuning, runs=runs, environment=environment(),
        commands=[" ".join(command_line())], created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        code_hash=_code_hash(design), notes=notes,
    )  # fmt: skip


def _code_hash(design: Design) -> str:
    """Hash of the sources of the compared parts, so that a finding shows when the code has changed since."""
    from metier.catalog.status import code_hash

    return code_hash(_sources(r for arm in design.arms.values() for r in designs.part_refs(arm)))


def _sources(refs: Iterable[tuple[str, Any]]) -> list[Path]:
    """Source files of parts; unknown ones are left out (the run will say so)."""
    from metier.core import part

    known = {i.id: i.path for i in part.listing()}
    ids = (f"{kind}/{part.split_ref(ref, kind)[0].split('/')[-1].replace('_', '-').lower()}" for kind, ref in refs)
    return sorted({Path(known[i]) for i in ids if i in known})
