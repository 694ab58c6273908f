"""Suggestions: scenarios with known answers, and the rules behind them on a made-up table."""

from dataclasses import replace

import pytest

from metier.core import choose, taxonomy
from metier.core.choose import suggest

FIRST = [
    ({}, ["dpo"], {"dpo"}),
    ({"paired": False, "noise": 0.3}, ["kto"], {"kto"}),
    ({"paired": False}, ["kto"], {"kto", "bco", "apo-zero-unpaired"}),
    ({"chosen_falling": True}, [], {"dpop", "rpo", "cal-dpo"}),
    ({"length_bias": True}, ["ln-dpo"], {"ln-dpo", "r-dpo", "simpo"}),
    ({"noise": 0.2}, ["cdpo"], {"cdpo", "robust-dpo", "dr-dpo"}),
    ({"scored_list": True}, ["pro"], {"pro", "lipo", "pl-dpo"}),
    ({"reference_affordable": False}, [], {"simper", "orpo", "simpo"}),
    ({"reference_affordable": False, "length_bias": True}, ["simpo"], {"simpo"}),
    ({"off_policy": True}, ["wpo"], {"wpo"}),
    ({"scores": True}, ["odpo"], {"odpo", "with-margin"}),
    ({"untuned": True, "reference_affordable": False}, ["orpo"], {"orpo", "cpo"}),
    ({"diversity": True}, [], {"f-dpo"}),
    ({"credit": True}, ["unlikelihood"], {"unlikelihood"}),
]


@pytest.mark.parametrize(("question", "first", "among"), FIRST, ids=[str(question) for question, _, _ in FIRST])
def test_scenarios(question, first, among):
    found = [s.id.split("/")[1] for s in suggest(**question)]
    assert found[: len(first)] == first
    assert among <= set(found)
    assert len(found) <= 5


def test_what_is_asked_for_is_met_and_said():
    for s in suggest(noise=0.3, chosen_falling=True):
        assert "wrong labels" in s.reason or "likelihood" in s.reason
        assert s.check
    (s, *_) = suggest()
    assert s.reason == choose.PLAIN


def test_no_reference_is_a_condition_where_it_can_be_met():
    table = taxonomy.described()
    assert all(table[s.id].reference == "free" for s in suggest(reference_affordable=False, limit=50))
    found = suggest(paired=False, reference_affordable=False)
    assert found
    assert all("reference_scores: cached" in s.reason for s in found)


def test_the_form_of_data_is_a_condition():
    table = taxonomy.described()
    for question, arity in (({}, "pair"), ({"paired": False}, "single"), ({"scored_list": True}, "list")):
        found = suggest(**question, limit=100)
        assert {table[s.id].arity for s in found} == {arity}
        names = {s.id.split("/")[1] for s in found}
        assert not names & {"bradley-terry", "nll", "npo", "sami"}, "no reward models, controls, unlearning, self-supervision"


def test_a_little_noise_is_no_noise():
    assert suggest(noise=0.05) == suggest()


def test_a_new_objective_is_suggested_by_itself():
    plain = taxonomy.traits("dpo")
    table = {
        "objective/new": replace(plain, declared=("data/quality/noise",), tags=("data/quality/noise",)),
        "objective/dpo": plain,
    }
    assert [s.id for s in suggest(noise=0.3, table=table)] == ["objective/new"]
    assert suggest(table={}) == []
    both = replace(
        plain, declared=("data/quality/noise", "model/generation/length"), tags=("data/quality/noise", "model/generation/length")
    )
    table = {"objective/both": both, **table}
    assert [s.id for s in suggest(noise=0.3, table=table)] == ["objective/new", "objective/both"]
    assert [s.id for s in suggest(noise=0.3, length_bias=True, table=table)] == ["objective/both", "objective/new"]


def test_the_same_question_has_the_same_answer():
    assert suggest(length_bias=True) == suggest(length_bias=True)


def test_every_remedy_is_an_option_and_there_is_one():
    for question, wish in choose.REMEDIES.items():
        asked = {question: 0.3 if question == "noise" else True}
        assert any(wish.reason in s.reason for s in suggest(**asked)), question
