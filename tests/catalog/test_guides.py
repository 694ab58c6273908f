"""Guides: every command they give works, their tables are made when the site is built, every place in a tree is shown."""

import json
import re
import shlex

import pytest

from metier import catalog
from metier.catalog.data import HERE
from metier.catalog.status import row_status
from metier.cli import main
from metier.core import choose, part, taxonomy
from metier.core.part import listing
from metier.docsite import facts, records, rowpages

GUIDES = sorted((HERE / "guides").glob("*.md"))
COMMAND = re.compile(r"`metier ([^`]+)`", re.S)
RUN = {"list", "show", "suggest", "logic", "rows"}
"""Verbs that only read: they are run. Of the others the names are looked up."""
PLANNED = {p for c in catalog.cards().values() for p in c.parts}


def commands() -> list[list[str]]:
    found = {tuple(shlex.split(" ".join(c.split()))) for g in GUIDES for c in COMMAND.findall(g.read_text(encoding="utf-8"))}
    return sorted(map(list, found))


@pytest.mark.parametrize("argv", commands(), ids=" ".join)
def test_commands_of_guides_work(argv, capsys):
    verb, *rest = argv
    if verb == "show" and rest[0] in PLANNED - {p.id for p in listing()}:
        return  # a part that a card promises
    if verb in RUN:
        with pytest.raises(SystemExit) as e:
            main(argv)
        assert e.value.code == 0, capsys.readouterr().err
        assert capsys.readouterr().out
    elif verb == "check":
        from metier.compare import study

        assert rest[0].removeprefix("study/") in study.names() or part.find(rest[0])
    else:
        assert verb == "train", "no other verb in a guide yet"
        from metier.core.yamlfile import parse_value

        key, _, value = rest[-1].partition("=")
        for ref in parse_value(value):
            part.build({"transform": "model"}[key], ref)


@pytest.fixture(scope="module")
def site():
    return facts.gather()


@pytest.mark.parametrize("row", [95, 134])
def test_the_page_of_a_survey_has_its_tables(row, site):
    page = rowpages.pages(site)[f"rows/{row}.md"]
    assert "{{" not in page
    assert "| --- |" in page


def test_every_objective_stands_in_the_table_of_records(site):
    lines = records.records(site, "../").splitlines()
    known = taxonomy.described()
    assert len(lines) == 2 + len(known)
    head = [c.strip() for c in lines[0].strip("|").split("|")]
    assert head == ["objective", *taxonomy.columns()]
    assert len(taxonomy.columns()) == 13
    row = next(line for line in lines if "/orpo.md" in line)
    assert [c.strip() for c in row.strip("|").split("|")][1:] == [getattr(known["objective/orpo"], c) for c in taxonomy.columns()]


def test_every_leaf_with_something_there_is_listed(site):
    text = records.places(site, "../")
    for tag, ids in choose.places().items():
        line = next(x for x in text.splitlines() if f"`{tag}`" in x)
        assert all(f"/{i}.md)" in line for i in ids), tag
        assert bool(ids) != ("nothing yet" in line)


def test_judged_cells_have_their_reasons(site):
    text = records.reasons(site, "../")
    assert "without Bradley-Terry" in text
    assert len(text.splitlines()) == 2 + sum(len(t.reasons) for t in taxonomy.described().values())


def test_an_unknown_table_is_refused(site):
    with pytest.raises(Exception, match="recordz"):
        records.filled("{{ recordz }}", site)
    assert records.filled("a {{ b }} c", site) == "a {{ b }} c"


def test_the_survey_rows_have_their_guides():
    for row in (95, 134):
        missing = row_status(catalog.row(row))["missing"]
        assert not [m for m in missing if "guide" in m or "page" in m], missing
    assert json.dumps(row_status(catalog.row(95)))
