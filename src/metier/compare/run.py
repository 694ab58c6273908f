"""Run a comparison: tune every arm with the same number of trials, then train every arm on the same seeds."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from metier.compare import design as designs
from metier.compare.design import Design
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
    notes: list[str] = []
    total = designs.jobs_count(design)
    counter = _Counter(report, total)
    trials = [j for arm in design.arms for j in _trials(design, arm, folder)]
    tried = {(j.arm, j.trial): r for j, r in counter.watch(_execute(design, trials, on_ray))}
    tuning = [_tuning(design, arm, trials, tried, notes) for arm in design.arms] if design.tune else []
    best = {t.arm: t.best for t in tuning}
    finals = [_job(design, arm, folder, seed=s, value=best.get(arm)) for s in range(design.seeds) for arm in design.arms]
    ran = [r for _, r in counter.watch(_execute(design, finals, on_ray))]
    result = _result(design, tuning, [*tried.values(), *ran], notes)
    write_json(folder / "comparison.json", result.model_dump(mode="json"))
    return result


class _Counter:
    def __init__(self, report: Report | None, total: int) -> None:
        self.report, self.total, self.done = report, total, 0

    def watch(self, results: Iterator[tuple[Job, RunResult]]) -> Iterator[tuple[Job, RunResult]]:
        for job, result in results:
            self.done += 1
            if self.report:
                self.report(job, result, self.done, self.total)
            yield job, result


def _execute(design: Design, jobs: list[Job], on_ray: bool) -> Iterator[tuple[Job, RunResult]]:
    todo = []
    for job in jobs:
        kept = stored(job)
        if kept is not None:
            yield job, kept
        else:
            todo.append(job)
    if on_ray:
        yield from run_jobs_on_ray(todo)
    else:
        parallel = min(design.parallel or cores(), max(1, len(todo)))
        yield from run_jobs(todo, parallel=parallel, crashed=lambda j, why: _failed(j, "crashed", why, 0.0))


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


def _tuning(design: Design, arm: str, trials: list[Job], tried: dict, notes: list[str]) -> Tuning:
    assert design.tune is not None
    jobs = [j for j in trials if j.arm == arm]
    values = [j.options[design.tune.option] for j in jobs]
    metric = [tried[(arm, j.trial)].metric for j in jobs]
    sign = 1 if design.lower_is_better else -1
    worst = math.inf
    ranked = sorted(range(len(values)), key=lambda i: (sign * metric[i] if metric[i] is not None else worst, i))
    best = ranked[0]
    if all(m is None for m in metric):
        notes.append(f"{arm}: every trial failed, so the first value of {design.tune.option} is used")
    elif len(values) > 1 and best in (0, len(values) - 1):
        notes.append(f"{arm}: the best {design.tune.option} ({values[best]:g}) is at the edge of what was tried")
    return Tuning(arm=arm, parameter=design.tune.option, values=values, metric=metric, best=values[best])


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
