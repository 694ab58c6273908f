"""``metier train RUN.yaml [key=value …]``."""

from pathlib import Path

import typer

app = typer.Typer()


@app.command()
def train(
    run: Path = typer.Argument(..., help="The run file."),
    overrides: list[str] = typer.Argument(None, metavar="[KEY=VALUE]...", help="Changes to the run file."),
    out: Path | None = typer.Option(None, "--out", "-o", help="Run folder (default: runs/<name of the run file>)."),
    restart: bool = typer.Option(False, "--restart", help="Start afresh instead of continuing the folder's run."),
    quiet: bool = typer.Option(False, "--quiet", "-q", help="No progress, only the result."),
    json: bool = typer.Option(False, "--json", help="Print the result as JSON."),
) -> int:
    """Train from a run file. A folder that holds a checkpoint is continued; Ctrl-C saves one first."""
    from metier.cli.output import emit_json
    from metier.core.api import train as train_run

    result = train_run(run, overrides or (), out=out, quiet=quiet or json, resume=not restart)
    if not result.main:
        return _code(result)
    if json:
        emit_json({"folder": str(result.folder), "status": result.status, "step": result.step, "metrics": result.metrics})
    else:
        print(_summary(result))
    return _code(result)


def _code(result) -> int:
    return 128 + result.signal if result.status == "interrupted" and result.signal else 0


def _summary(result) -> str:
    if result.status == "interrupted":
        return f"interrupted after step {result.step}; the checkpoint is complete. The same command continues."
    shown = [f"{k} {v:.4g}" for k, v in result.metrics.items() if k in ("loss",) or k.startswith("eval_")]
    where = next((result.folder / d for d in ("adapter", "model") if (result.folder / d).is_dir()), result.folder)
    next_step = f"\n  metier chat {result.folder}" if (result.folder / "adapter").is_dir() else ""
    what = f"{result.status} at step {result.step}: {', '.join(shown)}"
    return f"{what}\nresult in {where}{next_step}\n  metier report {result.folder}"
