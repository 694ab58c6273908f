"""``compare``: a design, or part names, to a result with a verdict."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from metier.compare import design as designs
from metier.compare.design import Design
from metier.compare.jobs import Job
from metier.compare.results import ComparisonResult, RunResult
from metier.core.errors import UsageError


def prepare(source: str | Path | Mapping[str, Any] | Sequence[str], *, seeds: int | None = None) -> Design:
    """A design from a file with overrides (``["design.yaml", "seeds=5"]``), a mapping, or part names with overrides."""
    if isinstance(source, Mapping):
        design = designs.load(source)[0]
    else:
        words = [str(source)] if isinstance(source, str | Path) else [str(s) for s in source]
        changes = [w for w in words if "=" in w]
        names = [w for w in words if "=" not in w]
        if not names:
            raise UsageError("name a design file or parts to compare")
        if not names[0].endswith((".yaml", ".yml")):
            return designs.shorthand(names, seeds=seeds, changes=changes)
        design = designs.load(names[0], changes)[0]
    return design if seeds is None else design.model_copy(update={"seeds": seeds})


def compare(
    design: Design | str | Path | Mapping[str, Any] | Sequence[str],
    *,
    out: str | Path | None = None,
    on_ray: bool = False,
    quiet: bool = False,
) -> tuple[ComparisonResult, Path]:
    """Run a comparison and return its result and folder. Raises ``UsageError`` when the design is wrong or unfair."""
    from metier.compare.run import run

    ready = design if isinstance(design, Design) else prepare(design)
    folder = Path(out or ready.out or Path("comparisons") / (ready.name or "comparison"))
    with _Progress(designs.jobs_count(ready), quiet) as progress:
        progress.say(designs.budget_line(ready))
        return run(ready, report=progress, on_ray=on_ray, folder=folder), folder


class _Progress:
    """A bar over all runs of a comparison; plain lines without a terminal."""

    def __init__(self, total: int, quiet: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        self.console = Console(stderr=True)
        self.quiet = quiet
        self.bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("left"), TimeRemainingColumn(), console=self.console,
            disable=quiet or not self.console.is_terminal, transient=True,
        )  # fmt: skip
        self.task = self.bar.add_task("starting workers", total=total)

    def __enter__(self) -> "_Progress":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def __call__(self, job: Job, result: RunResult, done: int, total: int) -> None:
        value = f"{result.metric:.4f}" if result.metric is not None else result.status
        tuned = "".join(f"  {k}={v:g}" for k, v in job.options.items())
        self.bar.update(self.task, completed=done, total=total, description=f"{job.label}")
        self.say(f"{done:3d}/{total}  {job.label:<24} {job.metric} {value}{tuned}  {result.seconds:.1f} s")

    def say(self, line: str) -> None:
        """One line above the bar."""
        if not self.quiet:
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)
