"""``metier list [KIND] [TEXT]``: the parts, without importing any of them."""

import typer

from metier.cli.output import emit_json, table
from metier.core.errors import unknown
from metier.core.part import KINDS, listing

app = typer.Typer()


@app.command()
def list_parts(
    kind: str | None = typer.Argument(None, help="A kind such as optimizer, or text to look for."),
    text: str | None = typer.Argument(None, help="Text to look for in name, summary and paper."),
    json: bool = typer.Option(False, "--json", help="Machine-readable output."),
) -> None:
    """List parts, by kind and text."""
    kind, text = (kind, text) if kind in KINDS or text else (None, kind)
    if kind is not None and kind not in KINDS:
        raise unknown("kind", kind, KINDS)
    wanted = (text or "").lower()
    found = [
        p for p in listing()
        if (kind is None or p.kind == kind) and wanted in f"{p.id} {p.summary} {p.paper} {p.object}".lower()
    ]  # fmt: skip
    if json:
        return emit_json(
            [
                {"id": p.id, "kind": p.kind, "name": p.name, "summary": p.summary, "paper": p.paper, "rows": list(p.rows)}
                for p in found
            ]
        )
    if not found:
        hint = f"{kind + ' ' if kind else ''}{text or ''}".strip()
        print(f"no part matches {hint!r}; metier list shows all {len(listing())}")
        return None
    return table(["part", "what it does"], [[p.id, p.summary] for p in found])
