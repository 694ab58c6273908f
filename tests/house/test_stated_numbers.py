"""Numbers that README, changelog and the written pages state are true; what changes from day to day is not stated at all."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from metier import catalog
from metier.core.part import listing
from metier.lab import words

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SPELT = {
    "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10, "eleven": 11,
    "twelve": 12, "thirteen": 13, "fourteen": 14, "fifteen": 15, "twenty": 20, "fifty": 50,
}  # fmt: skip


def arms(kind):
    return len(json.loads((ROOT / "findings" / "leaderboard" / f"{kind}.json").read_bytes())["arms"])


def events():
    from metier.core.events import EVENTS

    return len(EVENTS)


def record():
    from metier.core.taxonomy import FIELDS

    return len(FIELDS)


STATED = {
    "rows of the reading list": (r"(\d+)\s+rows", lambda: len(catalog.rows())),
    "events": (r"the (\w+) events", events),
    "fields of a record": (r"a record of (\w+) fields", record),
    "optimizers in the leaderboard": (r"leaderboard of (\w+) optimizers", lambda: arms("optimizer")),
    "objectives in the leaderboard": (r"leaderboard of (\w+) preference objectives", lambda: arms("objective")),
    "words of the word language": (r"language of (\d+) words", lambda: len(words.vocabulary())),
}


def number(text):
    return int(text) if text.isdigit() else SPELT[text.lower()]


@pytest.mark.parametrize("what", STATED)
def test_stated_numbers_are_true(what):
    pattern, truth = STATED[what]
    found = [(page.name, number(n)) for page in PAGES for n in re.findall(pattern, page.read_text(encoding="utf-8"))]
    assert found, f"nobody states the number of {what} any more: remove this line"
    assert all(n == truth() for _, n in found), (found, truth())


def test_counts_that_change_are_not_written_by_hand():
    """How many parts there are and how many rows work: the first page of the site and ``metier rows`` compute them."""
    kinds = "|".join(sorted({p.kind for p in listing()}))
    counted = re.compile(rf"\b\d+ (?:works|partial|missing|findings|studies|tests|parts|(?:{kinds})s|sources)\b")
    for page in PAGES:
        assert not counted.findall(page.read_text(encoding="utf-8")), page.name


def test_what_the_readme_says_of_the_findings():
    """Most hold only partly; the one that went against its paper is named."""
    readings = {p.stem: json.loads(p.read_bytes())["verdict"] for p in (ROOT / "findings" / "study").glob("*.json")}
    count = Counter(readings.values())
    assert count["partly"] > len(readings) / 2
    assert [name for name, word in readings.items() if word == "against"] == ["power-scheduler"]


def test_more_than_fifty_preference_losses():
    from metier.core.batch import Lists, Pairs, Rated

    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert "more than fifty losses on pairs, single judged answers and lists" in text
    assert sum(p.kind == "objective" and _reads(p.id) in (Pairs, Rated, Lists) for p in listing()) > 50


def _reads(id):
    from metier.core.lossmodule import batch_type
    from metier.testing._sample import sample

    return batch_type(sample(id).obj)


def test_formats_named_in_the_architecture():
    from metier.core.data.formats import FORMATS

    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = re.search(r"`formats\.detect\(rows\)` names one of (.*?) and says so", text, re.S)[1]
    assert set(re.findall(r"`([\w-]+)`", named)) == set(FORMATS)


def test_tests_named_by_the_readme_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in re.findall(r"`(tests/[\w/.]*)`", text):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"`(test_\w+\.py)`", text):
        assert list((ROOT / "tests").rglob(name)), name
