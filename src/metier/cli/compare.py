"""``metier compare DESIGN.yaml`` or ``metier compare optimizer/lion optimizer/adamw``."""

from pathlib import Path

import typer

app = typer.Typer()


@app.command()
def compare(
    design: list[str] = typer.Argument(
        ..., help="A design file with key=value changes, or parts of one kind (the control last)."
    ),
    seeds: int | None = typer.Option(None, "--seeds", min=1, help="Seeds per arm."),
    out: Path | None = typer.Option(None, "--out", "-o", help="Folder (default: comparisons/<name>)."),
    ray: bool = typer.Option(False, "--ray", help="Run on a Ray cluster."),
    quiet: bool = typer.Option(False, "--quiet", "-q"),
    record: bool = typer.Option(False, "--record", help="Keep the result in findings/leaderboard/, for the documentation."),
    json: bool = typer.Option(False, "--json", help="Print the result as JSON."),
) -> int:
    """Compare parts fairly. An interrupted comparison continues where it stopped."""
    from metier.cli.output import emit_json
    from metier.compare import check, leaderboard, report, table
    from metier.compare.api import compare as run_compare
    from metier.compare.api import prepare

    prepared = prepare(design, seeds=seeds)
    result, folder = run_compare(prepared, out=out, on_ray=ray, quiet=quiet or json)
    page = folder / "report.html"
    page.write_text(report.render(result), encoding="utf-8")
    if record:
        check.keep_leaderboard(result)
    if json:
        emit_json(result.model_dump(mode="json"))
    else:
        table.show(result)
        if len(result.arms) > 2 and any(r.eval_curve or r.also for r in result.runs):
            print(f"\n{leaderboard.plain(result)}")
        print(f"report: {page}")
    return 0
