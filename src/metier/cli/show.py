"""``metier show PART | ROW | CARD``."""

from typing import Any

import typer

app = typer.Typer()


@app.command()
def show(
    name: str = typer.Argument(..., help="A part (optimizer/lion, lion), a row number, or a card."),
    source: bool = typer.Option(False, "--source", help="Print the part's source file."),
    json: bool = typer.Option(False, "--json", help="Machine-readable output."),
) -> None:
    """Show a part with its options and claim, a row of the reading list, or a paper's card."""
    from metier.cli.output import emit_json, outline

    facts = _find(name)
    if source and "path" in facts:
        from pathlib import Path

        print(Path(facts["path"]).read_text(encoding="utf-8"), end="")
    elif json:
        emit_json(facts)
    else:
        print(outline(facts))


def _find(name: str) -> dict[str, Any]:
    from metier import catalog
    from metier.core import part
    from metier.core.errors import unknown

    wanted = name.strip().lower()
    if wanted.isdigit():
        return _row(int(wanted))
    dashed = wanted.replace("_", "-")
    hits = [p for p in part.listing() if dashed in (p.id, p.name)]
    if len(hits) == 1 or (hits and "/" in dashed):
        return _part(hits[0])
    if dashed in catalog.cards():
        return _card(dashed)
    known = [*(p.id for p in part.listing()), *(p.name for p in part.listing()), *catalog.cards()]
    if hits:
        raise unknown("part", name, [p.id for p in hits], more="Several parts have that name.")
    raise unknown("part, row or card", name, known, more="See: metier list, metier rows")


def _part(item: Any) -> dict[str, Any]:
    import inspect

    from metier.core import part
    from metier.core.resolve import common_schema

    obj = part.load(item.id)
    card = obj.__metier__
    claim = card.claim
    return {
        "part": item.id, "object": item.object, "summary": item.summary, "paper": item.paper, "rows": list(item.rows),
        "needs": sorted(card.needs), "conflicts": dict(card.conflicts),
        "claim": None if claim is None else {k: getattr(claim, k) for k in claim.__dataclass_fields__},
        "options": _options(part.options(obj)), "common options": _options(common_schema(item.kind)),
        "doc": inspect.getdoc(obj), "path": item.path,
    }  # fmt: skip


def _options(schema: Any) -> dict[str, dict[str, str]]:
    from metier.docsite.text import type_text

    return {
        o.name: {"type": type_text(o.annotation).replace("`", ""), "default": "required" if o.required else repr(o.default)}
        for o in schema.values()
    }


def _row(number: int) -> dict[str, Any]:
    from metier import catalog
    from metier.catalog.status import row_status

    row = catalog.row(number)
    return {**row_status(row), "note": row.note, "corrected title": list(row.corrected), "cards": [_card(c) for c in row.cards]}


def _card(id: str) -> dict[str, Any]:
    from dataclasses import asdict

    from metier import catalog

    return {"card": id, **{k: v for k, v in asdict(catalog.card(id)).items() if k != "id"}}
