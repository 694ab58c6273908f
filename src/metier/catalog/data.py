"""Rows and cards, read from the JSON files beside this module (JSON because it loads in milliseconds)."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from metier.core.errors import UsageError, unknown

HERE = Path(__file__).resolve().parent
CONFIDENCE = {
    "read-code": "the authors' or a trusted implementation was read",
    "read-paper": "the paper's text was read",
    "abstract+memory": "the abstract and summaries were read; details are from memory",
    "memory": "from memory",
}
T = TypeVar("T", "Row", "Card")


@dataclass(frozen=True, slots=True)
class Row:
    """One numbered row of the reading list."""

    row: int
    title: str
    """As the reading list has it."""
    corrected: tuple[str, ...]
    """The title of the paper, or of both papers, where it is not what the list says."""
    note: str
    """What a reader should know about the entry itself (two papers, a wrong year); often empty."""
    link: str
    """As the reading list has it; the card holds the paper's own."""
    section: str
    cards: tuple[str, ...]
    """Card ids, the one of the titled paper first."""

    @property
    def kind(self) -> str:
        """``trick``, ``study``, ``guide``, ``probe`` or ``law``: the kind of the first card."""
        return cards()[self.cards[0]].kind

    @property
    def parts(self) -> tuple[str, ...]:
        """Ids of the parts that the row's cards call for, in order, each once."""
        return tuple(dict.fromkeys(p for c in self.cards for p in cards()[c].parts))


@dataclass(frozen=True, slots=True)
class Card:
    """What we know of one paper, in our own words."""

    id: str
    rows: tuple[int, ...]
    """Rows that name the paper; none for a sheet about a whole family."""
    title: str
    by: str
    """Authors, then venue and year."""
    link: str
    section: str
    kind: str
    component: str
    """Kind of the part that carries the idea, or ``study`` or ``guide``."""
    summary: str
    method: str
    """The essence, a few lines."""
    claim: str
    figures: tuple[str, ...]
    """The paper's own numbers."""
    confidence: str
    """How the card was made: a key of ``CONFIDENCE``."""
    pitfalls: tuple[str, ...]
    cost: str
    parts: tuple[str, ...]
    """Part ids, existing or not yet."""
    study: str | None
    """Name of the study that re-tests the claim; ``None`` for a guide without one."""


@dataclass(frozen=True, slots=True)
class Catalog:
    """Everything, read once."""

    rows: tuple[Row, ...]
    cards: Mapping[str, Card]


@cache
def load() -> Catalog:
    """Read the catalogue; the result is shared and immutable."""
    read = [_record(Card, c) for path in sorted((HERE / "cards").glob("*.json")) for c in _json(path)]
    read.sort(key=lambda c: c.rows or (10**6,))
    listed = tuple(_record(Row, r) for r in _json(HERE / "rows.json"))
    return Catalog(listed, MappingProxyType({c.id: c for c in read}))


def _json(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_bytes())


def _record(kind: type[T], values: dict[str, Any]) -> T:
    given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return kind(**given)


def rows() -> tuple[Row, ...]:
    """All rows, in order."""
    return load().rows


def cards() -> Mapping[str, Card]:
    """All cards by id, in the order of their first row; family sheets last."""
    return load().cards


def row(number: int) -> Row:
    """The row with this number. Raises ``UsageError`` when the list has no such row."""
    every = rows()
    if not 1 <= number <= len(every):
        hint = f"Rows run from 1 to {len(every)}. See: metier rows"
        raise UsageError(f"there is no row {number}", hint=hint)
    return every[number - 1]


def card(id: str) -> Card:
    """The card with this id, dashes or underscores. Raises ``UsageError`` with the nearest id."""
    found = cards().get(id.strip().lower().replace("_", "-"))
    if found is None:
        raise unknown("card", id, cards(), more="See: metier rows")
    return found


def search(text: str) -> tuple[Card, ...]:
    """Cards that hold every word of ``text`` (any case, inside words too), best match first.

    A word counts more in the id and the title than in the parts, the summary, and the rest.
    """
    words = text.lower().split()
    scored = [(_score(c, words), c) for c in cards().values()] if words else []
    return tuple(c for s, c in sorted((x for x in scored if x[0]), key=lambda x: -x[0]))


def _score(c: Card, words: list[str]) -> int:
    titles = [rows()[n - 1].title for n in c.rows]
    rest = (c.method, c.claim, *c.figures, *c.pitfalls, c.section, c.kind, *titles)
    places = ((8, (c.id,)), (6, (c.title,)), (4, c.parts), (3, (c.summary,)), (2, (c.by,)), (1, rest))
    found = [(weight, " ".join(texts).lower()) for weight, texts in places]
    weights = [next((weight for weight, text in found if word in text), 0) for word in words]
    return sum(weights) if all(weights) else 0
