"""``metier list [KIND] [TEXT]``: the parts, without importing any of them."""

from typing import Any

import typer

from metier.cli.output import emit_json, table
from metier.core.errors import UsageError, unknown
from metier.core.part import KINDS, listing

app = typer.Typer()


@app.command()
def list_parts(
    kind: str | None = typer.Argument(None, help="A kind such as optimizer, or text to look for."),
    text: str | None = typer.Argument(None, help="Text to look for in name, summary and paper."),
    where: list[str] = typer.Option(
        [],
        "--where",
        metavar="FIELD=VALUE",
        help="Objectives of that record only: reference=free, tag=model/generation.",
    ),
    json: bool = typer.Option(False, "--json", help="Machine-readable output."),
) -> None:
    """List parts, by kind and text; objectives also by what they do."""
    kind, text = (kind, text) if kind in KINDS or text else (None, kind)
    if kind is not None and kind not in KINDS:
        raise unknown("kind", kind, KINDS)
    if where and kind not in (None, "objective"):
        raise UsageError("only objectives have records to filter by", where="--where")
    records = _records(where) if where else None
    wanted = (text or "").lower()
    found = [
        p for p in listing()
        if (kind is None or p.kind == kind) and (records is None or p.id in records)
        and wanted in f"{p.id} {p.summary} {p.paper} {p.object}".lower()
    ]  # fmt: skip
    if json:
        return emit_json(
            [
                {"id": p.id, "kind": p.kind, "name": p.name, "summary": p.summary, "paper": p.paper, "rows": list(p.rows)}
                | ({} if records is None else {"traits": records[p.id]})
                for p in found
            ]
        )
    if not found:
        hint = " ".join([kind or "", text or "", *where]).strip()
        print(f"no part matches {hint!r}; metier list shows all {len(listing())}")
        return None
    if records is not None:
        fields = [k for k in records[found[0].id] if k not in ("tags", "declared", "reasons", "reads")]
        return table(["part", *fields], [[p.id, *(records[p.id][f] for f in fields)] for p in found], head=True)
    return table(["part", "what it does"], [[p.id, p.summary] for p in found])


def _records(where: list[str]) -> dict[str, dict[str, Any]]:
    """Records of the objectives for which all conditions hold, by id. This calls the objectives."""
    from dataclasses import asdict

    from metier.core import choose, taxonomy

    conditions: list[tuple[str, str]] = []
    for condition in where:
        key, sign, value = condition.partition("=")
        if not sign:
            raise UsageError(f"{condition!r} is not of the form field=value", where="--where")
        conditions.append((key, value))
    found = taxonomy.described()
    for key, value in conditions:
        found = choose.matching(found, {key: value})
    return {id: asdict(t) for id, t in found.items()}
