"""One page per row of the reading list, and its tables by section, by kind and of family sheets."""

from collections import Counter
from pathlib import Path

from metier import catalog
from metier.catalog.data import CONFIDENCE, HERE, Card, Row
from metier.catalog.status import RowStatus
from metier.docsite import records
from metier.docsite.facts import Facts, Finding
from metier.docsite.text import bullets, escape, link_parts, table

KINDS = {
    "trick": "Techniques: something to train with.",
    "study": "Experiments: a controlled comparison answers them.",
    "guide": "Surveys and positions: a map or a checklist, each point with something to run.",
    "probe": "Measurements of a model or a run.",
    "law": "Curves fitted to many runs.",
}
STATUS = {
    "works": "its parts and their tests exist, and its study has a finding made by the current code",
    "partial": "some of its parts, findings or pages exist",
    "missing": "none of its parts exists yet",
}


def pages(facts: Facts) -> dict[str, str]:
    """``rows/index.md``, ``rows/kinds.md``, ``rows/families.md`` and ``rows/<number>.md``."""
    out = {
        "rows/index.md": _by_section(facts),
        "rows/kinds.md": _by_kind(facts),
        "rows/families.md": _families(facts),
    }
    return out | {f"rows/{s['row']}.md": _page(catalog.row(s["row"]), s, facts) for s in facts.statuses}


def counts(statuses: tuple[RowStatus, ...]) -> str:
    """``158 rows: 1 works, 2 partial, 155 missing``."""
    found = Counter(s["status"] for s in statuses)
    return f"{len(statuses)} rows: " + ", ".join(f"{found[s]} {s}" for s in STATUS)


def badge(status: str) -> str:
    """The status as a coloured word."""
    return f'<span class="status {status}">{status}</span>'


def _by_section(facts: Facts) -> str:
    out = [
        "# Reading list",
        f"{counts(facts.statuses)}. The status is computed, never written by hand: {_legend()}.",
        "The same list [by kind](kinds.md); [sheets about whole families](families.md). In the terminal: `metier rows`.",
    ]
    for section in dict.fromkeys(s["section"] for s in facts.statuses):
        out += [
            f"## {escape(section)}",
            _table([s for s in facts.statuses if s["section"] == section], facts, "kind"),
        ]
    return "\n\n".join(out) + "\n"


def _legend() -> str:
    return "; ".join(f"{badge(k)} {v}" for k, v in STATUS.items())


def _by_kind(facts: Facts) -> str:
    out = ["# Reading list by kind", "The same list [by section](index.md)."]
    for kind, what in KINDS.items():
        found = [s for s in facts.statuses if s["kind"] == kind]
        out += [f"## {kind}", f"{what} {len(found)} rows.", _table(found, facts, "section")]
    return "\n\n".join(out) + "\n"


def _table(found: list[RowStatus], facts: Facts, column: str) -> str:
    rows = [_line(s, facts, column) for s in found]
    return table(["row", "title", column, "status", "parts"], rows)


def _line(s: RowStatus, facts: Facts, column: str) -> list[str]:
    title = f"[{escape(s['title'])}]({s['row']}.md)"
    return [str(s["row"]), title, escape(str(s[column])), badge(s["status"]), _parts(s["parts"], facts)]


def _parts(ids: list[str] | tuple[str, ...], facts: Facts) -> str:
    return ", ".join(f"[{p}](../parts/{p}.md)" if p in facts.ids else p for p in ids)


def _page(row: Row, status: RowStatus, facts: Facts) -> str:
    # The kind of a row is that of its first card, so the line reads right for rows with two papers too.
    out = [
        f"# {escape(row.title)}",
        f"[Reading list](index.md) › {escape(row.section)} › row {row.row} · {row.kind} · " + badge(status["status"]),
        *_names(row),
        f"**Paper** <{row.link}>",
        f"**Parts** {_part_list(status, facts)}" if status["parts"] else "",
        f"**Still missing** {escape(', '.join(status['missing']))}" if status["missing"] else "",
    ]
    cards = [catalog.card(c) for c in row.cards]
    for c in cards:
        out += _card(c, facts, "##" if len(cards) > 1 else "")
    out.append(_neighbours(row.row, len(facts.statuses)))
    return "\n\n".join(b for b in out if b) + "\n"


def _names(row: Row) -> list[str]:
    corrected = f"**Titles as published** {'; '.join(escape(t) for t in row.corrected)}" if row.corrected else ""
    return [corrected, f"*{escape(row.note)}*" if row.note else ""]


def _part_list(status: RowStatus, facts: Facts) -> str:
    absent = [p for p in status["parts"] if p not in facts.ids]
    have = [p for p in status["parts"] if p in facts.ids]
    shown = [_parts(have, facts)] if have else []
    return "; ".join([*shown, *([f"not written yet: {', '.join(absent)}"] if absent else [])])


def _neighbours(number: int, last: int) -> str:
    back = f"[← row {number - 1}]({number - 1}.md)" if number > 1 else ""
    on = f"[row {number + 1} →]({number + 1}.md)" if number < last else ""
    return "---\n\n" + " · ".join(x for x in (back, on) if x)


def _card(c: Card, facts: Facts, heading: str) -> list[str]:
    sub = "###" if heading else "##"
    titled = [f"{heading} {escape(c.title)}"] if heading else []
    return [
        *titled,
        f"{escape(c.by)}. <{c.link}>" if heading else escape(c.by) + ".",
        escape(c.summary),
        f"{sub} Method", "  \n".join(escape(line) for line in c.method.splitlines()),
        f"{sub} Claim", escape(c.claim), bullets([escape(f) for f in c.figures]),
        *_measured(_findings(c, facts), sub),
        f"{sub} Pitfalls", bullets([escape(p) for p in c.pitfalls]),
        f"{sub} Cost", escape(c.cost[0].upper() + c.cost[1:]) + ("" if c.cost.endswith(".") else "."),
        *_guide(c, facts, sub),
        f"*How this sheet was made: {CONFIDENCE[c.confidence]}.*",
    ]  # fmt: skip


def _findings(c: Card, facts: Facts) -> list[Finding]:
    return [f for f in facts.findings if f.name == f"study/{c.study}" or f.name in c.parts]


def _measured(found: list[Finding], sub: str) -> list[str]:
    out = [f"{sub} What we measured"] if found else []
    for f in found:
        out += [
            f"{escape(f.question)} ([{f.name}](../findings.md#{f.name.replace('/', '-')}))",
            bullets(f.sentences),
        ]
    return out


def _guide(c: Card, facts: Facts, sub: str) -> list[str]:
    path = HERE / "guides" / f"{c.id}.md"
    return [f"{sub} Guide", guide_text(path, sub, facts)] if path.is_file() else []


def guide_text(path: Path, sub: str, facts: Facts) -> str:
    """A guide as a section: its title goes, its headings move below ``sub``, named parts become links, tables are put in."""
    lines = path.read_text(encoding="utf-8").strip().splitlines()
    body = lines[1:] if lines and lines[0].startswith("# ") else lines
    moved = [f"{sub}{line[1:]}" if line.startswith("## ") else line for line in body]
    return records.filled(link_parts("\n".join(moved).strip(), facts.ids, "../"), facts)


def _families(facts: Facts) -> str:
    found = [c for c in catalog.cards().values() if not c.rows]
    out = [
        "# Families",
        "Sheets about whole families of methods; the rows' own pages are in the [reading list](index.md).",
    ]
    for c in found:
        out += [*_card(c, facts, "##"), f"**Parts** {_parts(c.parts, facts)}" if c.parts else ""]
    return "\n\n".join(b for b in out if b) + "\n"
