"""What of a row works today: computed from registry, tests, findings and docs, never written by hand.

*works*: its parts exist and have oracle tests, its study has a finding made by the current code, its page is
in the docs; *partial*: some part, finding or guide exists; *missing*: none. A page alone does not count: the
site has one for every row.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypedDict

from metier.catalog.data import HERE, Card, Row, cards, rows
from metier.catalog.hashing import code_hash

__all__ = ["Places", "RowStatus", "code_hash", "row_status", "rows_status"]


class RowStatus(TypedDict):
    """One row as ``metier rows --json`` prints it."""

    row: int
    title: str
    link: str
    section: str
    kind: str
    parts: list[str]
    study: str | None
    """Study of the titled paper; a second paper's study is named in ``missing`` until it has a finding."""
    finding: str | None
    """First finding about the row, relative to the project, whether current or not."""
    status: Literal["works", "partial", "missing"]
    missing: list[str]


class PartLike(Protocol):
    """What is needed of ``metier.core.part.Listing``."""

    @property
    def id(self) -> str: ...
    @property
    def path(self) -> str: ...
    @property
    def rows(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class Places:
    """Where evidence is looked for; ``None`` where this installation has none, which is then not judged."""

    tests: Path | None
    findings: Path | None
    docs: Path | None
    guides: Path = HERE / "guides"

    @classmethod
    def here(cls) -> "Places":
        """The checkout this package runs from; an installed package has at most its findings."""
        root = HERE.parents[2]
        if not (root / "pyproject.toml").is_file():
            shipped = HERE.parent / "findings"
            return cls(None, shipped if shipped.is_dir() else None, None)
        return cls(root / "tests", root / "findings", root / "docs")


def rows_status(parts: Iterable[PartLike] | None = None, places: Places | None = None) -> list[RowStatus]:
    """The status of every row, in order."""
    known = _known(parts)
    where = places or Places.here()
    pages = _Pages(where.docs)
    return [_status(r, known, where, pages) for r in rows()]


def row_status(row: Row, parts: Iterable[PartLike] | None = None, places: Places | None = None) -> RowStatus:
    """The status of one row. ``parts`` defaults to the registry, ``places`` to this checkout."""
    where = places or Places.here()
    return _status(row, _known(parts), where, _Pages(where.docs))


def _known(parts: Iterable[PartLike] | None) -> dict[str, PartLike]:
    if parts is None:
        from metier.core.part import ROOT, listing

        parts = [p for p in listing() if Path(p.path).is_relative_to(ROOT)]
    return {p.id: p for p in parts}


def _status(row: Row, known: Mapping[str, PartLike], places: Places, pages: "_Pages") -> RowStatus:
    of_row = [cards()[c] for c in row.cards]
    declared = [p.id for p in known.values() if row.row in p.rows]
    parts = list(dict.fromkeys([*row.parts, *declared]))
    existing = [p for p in parts if p in known]
    checked = [_evidence(c, known, places) for c in of_row]
    findings = [f for e in checked for f in e.found]
    guides = [c for c in of_row if c.kind == "guide"]
    written = [g for g in guides if (places.guides / f"{g.id}.md").is_file()]
    missing = [
        *(f"part {p}" for p in parts if p not in known),
        *_tests_missing(existing, places, recorded=all(e.current for e in checked)),
        *(m for e in checked for m in e.missing),
        *(m for g in guides for m in _guide_missing(g, places)),
        *([] if pages.has(row.row) else ["page in the docs"]),
    ]
    begun = bool(existing or findings or written)
    return RowStatus(
        row=row.row, title=row.title, link=row.link, section=row.section, kind=row.kind, parts=parts,
        study=of_row[0].study, finding=findings[0] if findings else None,
        status=("partial" if begun else "missing") if missing else "works", missing=missing,
    )  # fmt: skip


def _tests_missing(parts: Sequence[str], places: Places, *, recorded: bool) -> list[str]:
    """Oracle tests that do not exist. Without the tests at hand, a current finding vouches for them."""
    if places.tests is None:
        return ["unknown tests"] if parts and not recorded else []
    return [f"test {p}" for p in parts if not test_path(p, places.tests).is_file()]


def test_path(part: str, tests: Path) -> Path:
    """The oracle test of a part, ``tests/parts/<kind>/test_<name>.py``."""
    kind, name = part.split("/")
    return tests / "parts" / kind / f"test_{name.replace('-', '_')}.py"


# --- findings -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Evidence:
    found: tuple[str, ...]
    missing: tuple[str, ...]

    @property
    def current(self) -> bool:
        return bool(self.found) and not self.missing


def _evidence(card: Card, known: Mapping[str, PartLike], places: Places) -> _Evidence:
    """The study's finding, or else one for each of the card's parts."""
    if card.study is None:
        return _Evidence((), ())
    if places.findings is None:
        return _Evidence((), (f"finding {card.study}",))
    found, missing = [], []
    for name, parts in _expected(card, places.findings).items():
        path = places.findings / f"{name}.json"
        short = path.relative_to(places.findings.parent).as_posix()
        if not path.is_file():
            missing.append(f"finding {name.removeprefix('study/')}")
            continue
        found.append(short)
        fault = _fault(path, parts, known)
        missing += [f"{fault} {short}"] if fault else []
    return _Evidence(tuple(found), tuple(missing))


def _expected(card: Card, findings: Path) -> dict[str, Sequence[str]]:
    """Names of the findings the card needs, with the parts each is about."""
    each: dict[str, Sequence[str]] = {p: [p] for p in card.parts}
    study = f"study/{card.study}"
    if (findings / f"{study}.json").is_file() or not any((findings / f"{p}.json").is_file() for p in each):
        return {study: card.parts}
    return each


def _fault(path: Path, parts: Sequence[str], known: Mapping[str, PartLike]) -> str | None:
    """Why a finding does not count for the current code; ``None`` when it does."""
    try:
        finding = json.loads(path.read_bytes())
        recorded = finding["code_hash"]
        hashed = list(_compared(finding)) or list(finding.get("parts", parts))
    except (ValueError, KeyError, TypeError, AttributeError):
        return "unreadable finding"
    if not all(p in known and Path(known[p].path).is_file() for p in hashed):
        return "stale finding"
    return None if code_hash(Path(known[p].path) for p in hashed) == recorded else "stale finding"


def _compared(finding: Mapping[str, Any]) -> Iterator[str]:
    """Ids of the parts that the arms of a comparison name; it hashed the sources of these."""
    from metier.compare.design import part_refs

    for arm in finding.get("arms", ()):
        for kind, ref in part_refs(arm["overrides"]):
            name = ref if isinstance(ref, str) else next(iter(ref))
            yield f"{kind}/{name.split('/')[-1].replace('_', '-').lower()}"


# --- pages --------------------------------------------------------------------------------------------------


class _Pages:
    """Rows with a page: all where ``metier.docsite`` makes one for each, else those with ``docs/rows/<row>.md``."""

    def __init__(self, docs: Path | None) -> None:
        self.docs = docs
        self.every = docs is None or (docs.parent / "src" / "metier" / "docsite").is_dir()

    def has(self, row: int) -> bool:
        return self.every or (self.docs is not None and (self.docs / "rows" / f"{row}.md").is_file())


def _guide_missing(card: Card, places: Places) -> list[str]:
    path = places.guides / f"{card.id}.md"
    if not path.is_file():
        return [f"guide {card.id}"]
    loose = sum(not _runnable(point) for point in guide_points(path.read_text(encoding="utf-8")))
    return [f"{loose} points of guide {card.id} without something to run"] if loose else []


def guide_points(text: str) -> list[str]:
    """The points of a guide page: its list items, each with its continuation lines."""
    points: list[str] = []
    for line in text.splitlines():
        if line.lstrip().startswith(("- ", "* ")):
            points.append(line)
        elif points and line.startswith(" ") and line.strip():
            points[-1] += " " + line.strip()
    return points


def _runnable(point: str) -> bool:
    return "`metier " in point or "](" in point
