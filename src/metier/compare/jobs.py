"""One run of a comparison: what it is, how it is executed, how its result is kept.

A job is a plain mapping, so that it can be hashed (a finished job is not run again when a comparison continues),
sent to another process, or to Ray.
"""

import hashlib
import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from metier.compare.results import Curve, RunResult
from metier.core.errors import MetierError
from metier.core.runfolder import write_json


class Job(BaseModel):
    """One training run of a comparison."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    arm: str
    seed: int
    trial: int | None
    """Index of the tuning trial; ``None`` for a final run."""
    run: dict[str, Any]
    """The complete run file."""
    options: dict[str, Any]
    """The tuned options and their values, for the report."""
    metric: str
    also: list[str] = Field(default_factory=list)
    budget: dict[str, float]
    code: str = ""
    """Hash of the sources of the run's parts: after a change of theirs a kept result counts no longer."""
    folder: str

    @property
    def key(self) -> str:
        """Hash of everything that decides the result."""
        decides = self.model_dump(exclude={"folder"})
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()

    @property
    def label(self) -> str:
        """Short name for progress."""
        return f"{self.arm} " + (f"seed {self.seed}" if self.trial is None else f"trial {self.trial + 1}")


def stored(job: Job) -> RunResult | None:
    """The result of an earlier execution of the same job, if it finished; one that crashed is tried again."""
    path = Path(job.folder) / "result.json"
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        found = RunResult.model_validate_json(json.dumps(kept["result"]))
        return found if kept["key"] == job.key and found.status != "crashed" else None
    except (OSError, ValueError, KeyError):
        return None


def execute(job: Job) -> RunResult:
    """Run a job and keep its result. A crash or divergence is a result like any other (it counts as the worst)."""
    folder = Path(job.folder)
    shutil.rmtree(folder, ignore_errors=True)
    began = time.monotonic()
    try:
        result = _train(job, folder)
    except KeyboardInterrupt:
        raise
    except MetierError as e:
        status = "diverged" if type(e).__name__ == "NonFiniteError" else "crashed"
        result = _failed(job, status, str(e), time.monotonic() - began)
    except Exception as e:
        result = _failed(job, "crashed", f"{type(e).__name__}: {e}", time.monotonic() - began)
    write_json(folder / "result.json", {"key": job.key, "result": result.model_dump(mode="json")})
    return result


def _train(job: Job, folder: Path) -> RunResult:
    from metier.core.api import train
    from metier.core.budget import apply_budget

    run = apply_budget(job.run, job.budget)
    done = train(run, out=folder, quiet=True, keep_weights=False, handle_signals=False, count_flops=True)
    if done.status == "interrupted":
        raise KeyboardInterrupt
    steps = [e for e in done.events if e["event"] == "step"]
    evals = [e for e in done.events if e["event"] in ("eval", "step") and job.metric in e and job.metric != "loss"]
    metric = done.metrics.get(job.metric)
    if metric is None:
        raise MetierError(f"the run reports no {job.metric!r}; it reports {', '.join(sorted(done.metrics))}")
    finite = math.isfinite(metric)
    return RunResult(
        arm=job.arm, seed=job.seed, trial=job.trial, options=job.options,
        metric=metric if finite else None, status="done" if finite else "diverged", error=None,
        curve=_curve(steps, "loss"), eval_curve=_curve(evals, job.metric) if evals else None,
        seconds=steps[-1]["elapsed"], tokens=int(steps[-1]["tokens"]), flops=done.flops,
        peak_bytes=done.peak_bytes, state_bytes=done.state_bytes, params=done.params, folder=job.folder,
        also={name: done.metrics.get(name) for name in job.also},
    )  # fmt: skip


def _curve(events: list[dict[str, Any]], name: str) -> Curve:
    return Curve(
        step=[e["step"] for e in events], tokens=[int(e["tokens"]) for e in events], seconds=[e["elapsed"] for e in events],
        value=[e[name] for e in events],
    )  # fmt: skip


def _failed(job: Job, status: Any, error: str, seconds: float) -> RunResult:
    empty = Curve(step=[], tokens=[], seconds=[], value=[])
    return RunResult(
        arm=job.arm, seed=job.seed, trial=job.trial, options=job.options, metric=None, status=status, error=error,
        curve=empty, eval_curve=None, seconds=seconds, tokens=0, flops=0.0, peak_bytes=0, state_bytes=0, params=0,
        folder=job.folder,
    )  # fmt: skip
