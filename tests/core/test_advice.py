"""Advice about schedules: the figures printed in arXiv:2501.18965 (as recomputed for its card)."""

import json

import pytest

from metier.cli import main
from metier.core.advice import advise
from metier.core.errors import UsageError

WSD = {"wsd": {"decay": 0.2, "shape": "linear"}}


def test_learning_rates_move_between_schedules_as_the_paper_says():
    """gamma* at T = 400: constant .01818, WSD 20 % .02537, cosine .04824, linear .04956."""
    rows = {r["schedule"]: r for r in advise(WSD, 400, lr=0.02537)["schedules"]}
    for name, peak in (("constant", 0.01818), ("cosine", 0.04824), ("linear", 0.04956)):
        assert rows[f"schedule/{name}"]["lr"] == pytest.approx(peak, rel=0.02)
    assert rows["schedule/wsd"]["lr"] == 0.02537
    assert rows["schedule/constant"]["bound"] / rows["schedule/wsd"]["bound"] == pytest.approx(2.751 / 2.187, rel=0.01)
    assert all(r["bound"] >= 1 for r in rows.values())


def test_two_ways_of_going_on():
    """T2/T1 = 2: cooldown .635 or plateau .532."""
    found = advise(WSD, 4000, longer=8000)["longer"]
    assert found["cooldown"] == pytest.approx(0.635, abs=0.01)
    assert found["plateau"] == pytest.approx(0.532, abs=0.01)
    assert found["plateau_from_step"] == 3200


@pytest.mark.parametrize(("steps", "longer"), [(1, None), (100, 100), (100, 50)])
def test_lengths_that_make_no_sense_are_refused(steps, longer):
    with pytest.raises(UsageError, match="steps"):
        advise(WSD, steps, longer=longer)


def test_the_verb_prints_a_table_and_json(capsys):
    with pytest.raises(SystemExit) as e:
        main(["schedule", "wsd", "decay=0.2", "shape=linear", "--steps", "400", "--longer", "800"])
    assert not e.value.code
    out = capsys.readouterr().out
    assert "schedule/linear" in out
    assert "to go on to 800 steps" in out
    with pytest.raises(SystemExit):
        main(["schedule", "cosine", "--steps", "100", "--json"])
    assert json.loads(capsys.readouterr().out)["schedules"][0]["schedule"] == "schedule/cosine"
