"""Every committed finding can be read: a page that says otherwise would hide a result."""

from metier.docsite import extra
from metier.docsite.facts import gather


def test_every_finding_has_a_sentence_of_its_own():
    facts = gather()
    assert facts.findings
    for found in facts.findings:
        assert not any("cannot be read" in s for s in found.sentences), found.name


def test_leaderboards_are_readable():
    assert extra.leaderboards(gather()).startswith("# Leaderboards")
