"""Rules of the house for the catalogue's data: complete cards, plain text, well-formed names, reviewable files."""

import json
import re
from pathlib import Path

import pytest

from metier import catalog
from metier.catalog.data import CONFIDENCE, HERE, Card
from metier.core.part import KINDS, ROOT, listing

FILES = [*sorted((HERE / "cards").glob("*.json")), HERE / "rows.json"]
CARDS = list(catalog.cards().values())
PLAIN = re.compile(r"^[a-z0-9]+(-[a-z0-9]+)*$")
FOREIGN = re.compile(
    r"\bnot found\b|not re-read|re-verified|remembered|transcribed|sources? read|stored sources"
    r"|\bthis card\b|\bthe card\b|in the library|the library's|\bTODO\b|\bFIXME\b",
    re.I,
)


def texts(c: Card) -> list[str]:
    return [c.title, c.by, c.summary, c.method, c.claim, c.cost, *c.figures, *c.pitfalls]


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_files_are_small_and_written_for_review(path: Path):
    text = path.read_text(encoding="utf-8")
    assert len(text.encode()) < 200_000
    assert text == json.dumps(json.loads(text), indent=1, ensure_ascii=False) + "\n"


def test_card_files_are_sorted_by_row_and_hold_each_id_once():
    ids = []
    for path in FILES[:-1]:
        read = json.loads(path.read_bytes())
        first = [(c["rows"] or [10**6])[0] for c in read]
        assert first == sorted(first), path.name
        ids += [c["id"] for c in read]
    assert len(ids) == len(set(ids)) == len(CARDS)


@pytest.mark.parametrize("c", CARDS, ids=lambda c: c.id)
def test_a_card_is_complete_and_plain(c: Card):
    assert PLAIN.match(c.id)
    assert c.kind in {"trick", "study", "guide", "probe", "law"}
    assert c.component in {*KINDS, "study", "guide"}
    assert c.confidence in CONFIDENCE
    assert c.link.startswith("https://")
    assert re.search(r"\b(19|20)\d\d\b", c.by), "a year"
    assert 1 <= len(c.pitfalls) <= 6
    assert 60 < len(c.summary) < 480
    assert 1 <= c.method.count("\n") + 1 <= 4
    assert c.claim
    assert c.cost
    for text in texts(c):
        assert text == text.strip()
        assert not FOREIGN.search(text), text
        assert "\n\n" not in text
        assert "  " not in text
    for text in (c.summary, c.claim, *c.pitfalls):
        assert text[-1] in ".!?", text


@pytest.mark.parametrize("c", CARDS, ids=lambda c: c.id)
def test_a_claim_has_the_papers_figures_unless_it_has_none(c: Card):
    numberless = c.kind == "guide" or not c.rows
    assert c.figures or numberless


@pytest.mark.parametrize("c", CARDS, ids=lambda c: c.id)
def test_parts_are_well_formed_and_studies_named_after_the_card(c: Card):
    assert len(set(c.parts)) == len(c.parts)
    for p in c.parts:
        kind, _, name = p.partition("/")
        assert kind in KINDS, p
        assert PLAIN.match(name), p
    assert c.study == (None if c.component == "guide" else c.id)
    assert c.parts or c.component in {"guide", "study"}, "a technique names at least one part"


def test_no_part_name_stands_for_two_kinds_of_spelling():
    """``adamw`` and ``adam-w`` would be two parts for one idea."""
    seen: dict[str, str] = {}
    for p in sorted({p for c in CARDS for p in c.parts}):
        assert seen.setdefault(p.replace("-", ""), p) == p


def test_parts_name_rows_that_exist():
    for p in listing():
        if Path(p.path).is_relative_to(ROOT):
            assert all(1 <= n <= 158 for n in p.rows), p.id
