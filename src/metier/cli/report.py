"""``metier report FOLDER``: one self-contained HTML page."""

import json as jsonlib
from pathlib import Path

import typer

app = typer.Typer()


@app.command()
def report(
    folder: Path = typer.Argument(..., help="A run folder or a comparison folder."),
    out: Path | None = typer.Option(None, "--out", "-o", help="Where to write (default: FOLDER/report.html)."),
    json: bool = typer.Option(False, "--json", help="Print the data behind the report instead."),
) -> None:
    """Write the report of a run or comparison; it works offline."""
    from metier.cli.output import emit_json
    from metier.compare import report as pages
    from metier.compare.results import ComparisonResult
    from metier.core import log
    from metier.core.errors import UsageError

    comparison, record = folder / "comparison.json", folder / "run.json"
    if comparison.is_file():
        try:
            result = ComparisonResult.model_validate_json(comparison.read_text(encoding="utf-8"))
        except ValueError as e:
            raise UsageError(f"{comparison} cannot be read: {str(e).splitlines()[0]}") from None
        data, html = result.model_dump(mode="json"), pages.render(result)
    elif record.is_file():
        run = jsonlib.loads(record.read_text(encoding="utf-8"))
        events = log.read(folder)
        data, html = {"run": run, "metrics": events}, pages.render_run(run, events)
    else:
        raise UsageError(f"{folder} holds neither run.json nor comparison.json", hint="See: metier runs")
    if json:
        return emit_json(data)
    target = out or folder / "report.html"
    target.write_text(html, encoding="utf-8")
    print(target)
    return None
