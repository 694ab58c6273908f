"""Studies: verdicts from checks, the record of a finding, unknown names."""

import json

import pytest

from metier.compare import study
from metier.compare.study import Check, Outcome
from metier.core.errors import UsageError


def check(holds):
    return Check("a below b", "< 0.1", 0.25 if not holds else 0.05, holds)


@pytest.mark.parametrize(
    ("holds", "word"), [([True, True], "holds"), ([True, False], "partly"), ([False, False], "against"), ([True], "holds")]
)
def test_the_word_follows_from_the_checks(holds, word):
    assert Outcome([check(h) for h in holds]).verdict == word


def test_the_sentence_names_what_did_not_hold():
    text = Outcome([check(True), check(False)]).text
    assert text == "1 of 2 predictions held. Not: a below b (expected < 0.1, seen 0.25)."
    assert Outcome([check(True)]).text == "1 of 1 predictions held."


class Module:
    """Says what it asks."""

    PARTS = ("optimizer/lion", "optimizer/signum")
    CLAIM = "They agree."

    @staticmethod
    def run(given):
        assert given.folder.is_dir()
        return Outcome([check(True)], figures={"loss": float("nan")}, notes=["small"])


def test_a_finding_is_recorded_with_the_code_it_is_about(monkeypatch, tmp_path):
    from metier.catalog.status import code_hash
    from metier.core import part
    from metier.docsite.facts import read_finding

    monkeypatch.setattr(study, "load", lambda name: Module)
    outcome, place = study.run("made-up", quick=True, folder=tmp_path)
    found = json.loads(place.read_text())
    assert outcome.verdict == found["verdict"] == "holds"
    assert found["figures"] == {"loss": None}
    assert found["code_hash"] == code_hash([part.find(p).path for p in Module.PARTS])
    page = read_finding("study/made-up", found)
    assert page.parts == Module.PARTS
    assert "Says what it asks." in page.question
    assert any("✓ a below b: expected < 0.1, seen 0.05" in s for s in page.sentences)


def test_unknown_studies_are_refused():
    with pytest.raises(UsageError, match="study"):
        study.run("no-such-study")


def test_every_study_names_existing_parts():
    from metier.core import part

    for name in study.names():
        module = study.load(name)
        assert module.CLAIM
        assert module.__doc__
        for p in module.PARTS:
            part.find(p)
