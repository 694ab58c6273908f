"""``metier rows``: the reading list and what works of it."""

from collections import Counter

import typer

app = typer.Typer()


@app.command()
def rows(
    json: bool = typer.Option(False, "--json", help="Machine-readable output."),
    status: str | None = typer.Option(None, "--status", help="Only works, partial or missing."),
) -> None:
    """The reading list with the computed status of every row."""
    from metier.catalog.status import rows_status
    from metier.cli.output import emit_json, table
    from metier.core.errors import unknown

    if status not in (None, "works", "partial", "missing"):
        raise unknown("status", status, ("works", "partial", "missing"))
    found = rows_status()
    chosen = [r for r in found if status is None or r["status"] == status]
    if json:
        return emit_json(chosen)
    table(["row", "status", "kind", "title"], [[r["row"], r["status"], r["kind"], r["title"]] for r in chosen])
    counts = Counter(r["status"] for r in found)
    print(f"{len(found)} rows: " + ", ".join(f"{counts[s]} {s}" for s in ("works", "partial", "missing")))
    return None
