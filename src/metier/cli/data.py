"""``metier data preview`` and ``metier data check``: data as the model will see them; every row checked."""

from typing import Any

import typer

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    help="Look at data as the model will see them; check every row.",
)

FILE = typer.Argument(..., help="File, folder, lab/<name> or hub id.")
FORMAT = typer.Option("auto", "--format", help="Format of the rows; auto recognises it.")
COLUMNS = typer.Option([], "--columns", help="expected=yours, for keys with other names; repeatable.")
LIMIT = typer.Option(None, "--limit", min=1, help="Read only the first rows.")
SPLIT = typer.Option(None, "--split", help="Split of a hub data set or folder.")
JSON = typer.Option(False, "--json", help="Machine-readable output.")


@app.command()
def preview(
    file: str = FILE,
    format: str = FORMAT,
    columns: list[str] = COLUMNS,
    limit: int = typer.Option(3, "--limit", min=1, help="Number of rows to show."),
    split: str | None = SPLIT,
    model: str | None = typer.Option(None, "--model", help="Show tokens and loss mask with this model's tokenizer."),
    json: bool = JSON,
) -> None:
    """Show the first rows as examples; with --model as tokens, marking those that carry loss."""
    import sys

    from metier.cli.output import emit_json
    from metier.core.data.formats import examples
    from metier.core.data.rows import open_rows

    rows = open_rows(file, split=split, columns=pairs(columns), limit=limit)
    found = examples(rows, format, notice=lambda text: print(text, file=sys.stderr))[:limit]
    if model:
        from metier.core.data.preview import render

        return emit_json(render(found, model, json=True)) if json else print(render(found, model))
    if json:
        return emit_json([{"type": type(e).__name__, **plain(e)} for e in found])
    return print("\n\n".join(described(e) for e in found))


@app.command()
def check(
    file: str = FILE, format: str = FORMAT, columns: list[str] = COLUMNS, limit: int | None = LIMIT,
    split: str | None = SPLIT, json: bool = JSON,
) -> None:  # fmt: skip
    """Check every row; exit code 1 when some cannot be used."""
    from metier.cli.output import emit_json
    from metier.core.data.check import check_rows
    from metier.core.data.readers import Problems
    from metier.core.data.rows import open_rows

    unread = Problems(keep=None)
    rows = open_rows(file, split=split, columns=pairs(columns), limit=limit, problems=unread)
    if not len(rows):
        raise unread.error(rows.name)
    report = check_rows(rows, format, unread)
    emit_json(report.json()) if json else show(report)
    if not report.ok:
        raise typer.Exit(1)


def pairs(columns: list[str]) -> dict[str, str]:
    """``["text=body"]`` as ``{"text": "body"}``."""
    from metier.core.errors import UsageError

    for item in columns:
        if not all(item.partition("=")):
            raise UsageError(f"--columns {item}: expected name=yours", hint="Such as: --columns text=body")
    return dict(item.split("=", 1) for item in columns)


def plain(example: Any) -> dict[str, Any]:
    """An example as JSON-able dict."""
    from dataclasses import asdict

    return asdict(example)


def described(example: Any) -> str:
    """An example as text: one field per paragraph, turns with their role."""
    lines = [f"{example.id}  {type(example).__name__}"]
    for key, value in plain(example).items():
        if key in ("id", "meta") or value is None:
            continue
        turns = isinstance(value, tuple) and value and isinstance(value[0], dict)
        lines += [f"  {key} / {m['role']}: {m['content']}" for m in value] if turns else [f"  {key}: {value}"]
    return "\n".join(lines)


def show(report: Any) -> None:
    """The report of a check as text."""
    from metier.cli.output import table

    for line in (report.explanation, *report.notices):
        print(line)
    barren = f", {report.barren} rows with nothing to compare" if report.barren else ""
    print(f"{report.rows} rows, {report.examples} examples{barren}, {report.duplicates} duplicates, "
          f"{len(report.problems)} bad rows")  # fmt: skip
    if report.duplicate_ids:
        shown = ", ".join(f"{k} ({n}×)" for k, n in list(report.duplicate_ids.items())[:10])
        print(f"{len(report.duplicate_ids)} ids occur more than once: {shown}")
    if report.labels:
        print("labels: " + ", ".join(f"{k}: {n}" for k, n in list(report.labels.items())[:20]))
    if report.lengths:
        rows = [[k, v["min"], v["median"], v["p95"], v["max"]] for k, v in report.lengths.items()]
        table(["characters", "least", "median", "95 %", "most"], rows)
    if report.problems:
        table(["row", "problem"], report.problems)
