"""``check``: contract, study, finding; and which finding counts."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from metier.catalog import status
from metier.cli import main
from metier.compare import check as checking
from metier.compare import design as designs
from metier.compare import run as runner
from metier.compare.check import check, check_all, stalest
from metier.compare.jobs import execute
from metier.core import part
from metier.core.errors import UsageError
from metier.core.part import Claim

TINY = {
    "model": "lab/llama-50k",
    "data": {"train": "lab/pydoc", "limit": 12, "chunk": True, "max_length": 32, "eval_fraction": 0.2, "eval_limit": 4},
    "schedule": "constant",
    "optimizer": {"adamw": {"lr": 1e-3}},
    "train": {"steps": 3, "batch": 4},
}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A checkout of its own: studies, findings and comparisons are written and read here; jobs run in this process."""
    (tmp_path / "pyproject.toml").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checking, "ROOT", tmp_path)
    monkeypatch.setattr(checking, "STUDIES", tmp_path / "studies")
    for kind in designs.BASES:
        monkeypatch.setitem(designs.BASES, kind, TINY)
    for kind in designs.LAB_TUNE:
        monkeypatch.setitem(designs.LAB_TUNE, kind, {"factors": [1.0, 30.0]})
    tests = SimpleNamespace(ran=[], root=tmp_path)

    def jobs(todo, *, parallel, crashed):
        for job in todo:
            tests.ran.append(job.label)
            yield job, execute(job)

    monkeypatch.setattr(runner, "run_jobs", jobs)
    monkeypatch.setattr("metier.testing.check_part", lambda id: ["first", "second"])
    return tests


def claiming(monkeypatch, id, **claim):
    obj = part.load(id)
    card = obj.__metier__
    given = {"text": "It is better", "metric": "eval_loss", "against": "optimizer/adamw", **claim}
    monkeypatch.setattr(obj, "__metier__", part.Card(card.id, card.paper, card.rows, Claim(**given), card.needs, card.conflicts))


def known():
    return {i.id: i for i in part.listing()}


def invoke(*argv):
    with pytest.raises(SystemExit) as e:
        main(["check", *argv])
    return e.value.code


# --- contract -------------------------------------------------------------------------------------------------


def test_contract_only(place):
    found = check("optimizer/lion", study=False)
    assert (found.name, found.contract, found.word) == ("optimizer/lion", ("first", "second"), "contract only")
    assert (found.verdict, found.finding, place.ran) == (None, None, [])
    assert not (place.root / "findings").exists()


def test_the_real_contract_suite_runs():
    assert len(check("schedule/cosine", study=False).contract) > 2


def test_a_part_that_claims_nothing_is_checked_by_its_contract(place):
    found = check("schedule/cosine")
    assert (found.word, found.verdict, place.ran) == ("contract only", None, [])


def test_a_broken_contract_names_the_part(place, monkeypatch, capsys):
    def broken(id):
        raise AssertionError("it forgets its state")

    monkeypatch.setattr("metier.testing.check_part", broken)
    with pytest.raises(AssertionError, match=r"optimizer/lion is broken: it forgets"):
        check("lion")
    assert invoke("optimizer/lion", "--contract") == 1
    assert "the contract of optimizer/lion is broken: it forgets its state" in capsys.readouterr().err
    claiming(monkeypatch, "optimizer/signum")
    assert invoke("--all") == 1
    assert "the contract of None" not in capsys.readouterr().err


def test_an_unknown_part_is_refused_with_the_nearest(place):
    with pytest.raises(UsageError, match="optimizer/lion"):
        check("optimizer/loin")


# --- study ----------------------------------------------------------------------------------------------------


def test_a_study_by_the_shorthand_leaves_a_finding_that_counts(place, monkeypatch):
    claiming(monkeypatch, "optimizer/signum", text="Signum is better", figure="0.1 lower", minimum_effect=0.001)
    found = check("optimizer/signum", quiet=True)
    assert len(place.ran) == 2 * (2 + 3)
    assert found.finding == place.root / "findings" / "optimizer" / "signum.json"
    kept = json.loads(found.finding.read_text())
    assert kept["part"] == "optimizer/signum"
    assert (kept["claim"], kept["paper_figure"]) == ("Signum is better", "0.1 lower")
    assert kept["verdict"] == found.word == found.verdict.word
    assert kept["effect"] == pytest.approx(found.verdict.effect)
    assert kept["interval"] == pytest.approx([found.verdict.low, found.verdict.high])
    assert kept["minimum_effect"] == 0.001
    assert kept["code_hash"] == status.code_hash([known()[p].path for p in ("optimizer/signum", "optimizer/adamw")])
    assert status._fault(found.finding, ["optimizer/signum"], known()) is None
    assert len(kept["runs"]) == 10
    assert all("folder" not in r for r in kept["runs"])
    assert found.report is not None
    assert found.report.is_file()


def test_rows_accept_the_finding_as_current(place, monkeypatch):
    """One part of a card has a finding, so every other part of it is asked for one, and this one is not stale."""
    claiming(monkeypatch, "optimizer/signum")
    check("optimizer/signum", quiet=True)
    from metier import catalog

    places = status.Places(None, place.root / "findings", None)
    (row,) = [r for r in catalog.rows() if any("optimizer/signum" in catalog.card(c).parts for c in r.cards)]
    found = status.row_status(row, places=places)
    assert found["finding"] == "findings/optimizer/signum.json"
    assert not [m for m in found["missing"] if "signum" in m]
    assert [m for m in found["missing"] if m == "finding optimizer/lion"]


def test_a_trial_with_other_seeds_is_kept_out_of_the_findings(place, monkeypatch):
    claiming(monkeypatch, "optimizer/signum")
    found = check("optimizer/signum", seeds=2, out=place.root / "trial", quiet=True)
    assert found.finding == place.root / "trial" / "finding.json"
    assert json.loads(found.finding.read_text())["seeds"] == [0, 1]
    assert not (place.root / "findings").exists()


def test_without_a_checkout_the_finding_stays_with_the_comparison(place, monkeypatch):
    (place.root / "pyproject.toml").unlink()
    claiming(monkeypatch, "optimizer/signum")
    found = check("optimizer/signum", out=place.root / "here", quiet=True)
    assert found.finding == place.root / "here" / "finding.json"


def test_kept_runs_are_used_again_until_the_code_of_a_part_changes(place, monkeypatch):
    claiming(monkeypatch, "optimizer/signum")
    first = check("optimizer/signum", quiet=True)
    ran = len(place.ran)
    again = check("optimizer/signum", quiet=True)
    assert len(place.ran) == ran
    assert again.verdict == first.verdict
    changed = place.root / "parts" / "signum.py"
    changed.parent.mkdir()
    changed.write_text(Path(known()["optimizer/signum"].path).read_text() + "\nCHANGED = 1\n")
    listing = tuple(
        part.Listing(**{**i.__dict__, "path": str(changed)}) if i.id == "optimizer/signum" else i for i in part.listing()
    )
    monkeypatch.setattr(part, "listing", lambda: listing)
    check("optimizer/signum", quiet=True)
    assert len(place.ran) == ran + 5
    assert all(label.startswith("signum") for label in place.ran[ran:])


HOOK_STUDY = """
question: Does averaging help?
run: {run}
factor: hooks
control: plain
tune: null
seeds: 2
arms:
  plain: {{hooks: []}}
  averaged: {{hooks: [{{ema: {{decay: 0.5}}}}]}}
"""


def test_a_study_file_whose_arms_name_no_kind_counts_by_the_part_itself(place):
    (place.root / "studies").mkdir()
    (place.root / "studies" / "hook-ema.yaml").write_text(HOOK_STUDY.format(run=json.dumps(TINY)))
    found = check("hook/ema", quiet=True)
    kept = json.loads(found.finding.read_text())
    assert found.claim == kept["claim"] == "Does averaging help?"
    assert found.verdict.arm == "averaged"
    assert kept["code_hash"] == status.code_hash([known()["hook/ema"].path])
    assert status._fault(found.finding, ["hook/ema"], known()) is None


def test_the_arm_of_the_part_is_judged_among_several(place):
    design = designs.load({
        "run": TINY, "control": "adamw", "arms": {
            "adamw": {"optimizer": "adamw"}, "other": {"optimizer": "lion"}, "mine": {"optimizer": {"signum": {}}},
        },
    })[0]  # fmt: skip
    assert checking._arm(design, known()["optimizer/signum"]) == "mine"
    assert checking._arm(design, known()["optimizer/lion"]) == "other"


# --- the command ----------------------------------------------------------------------------------------------


def test_exit_code_three_when_the_claim_does_not_hold(place, monkeypatch, capsys):
    claiming(monkeypatch, "optimizer/signum", minimum_effect=50.0)
    assert invoke("optimizer/signum") == 3
    out = capsys.readouterr().out
    assert "optimizer/signum: 2 contract checks passed" in out
    assert "finding:" in out
    assert invoke("optimizer/signum", "--json") == 3
    (said,) = json.loads(capsys.readouterr().out)
    assert said["word"] == said["verdict"]["word"] != "holds"
    assert said["contract"] == ["first", "second"]


def test_exit_code_zero_when_it_holds_or_nothing_is_claimed(place, monkeypatch, capsys):
    obj = part.load("optimizer/signum")
    monkeypatch.setattr(checking, "judge", lambda result: [SimpleNamespace(**VERDICT)])
    claiming(monkeypatch, "optimizer/signum")
    assert obj.__metier__.claim is not None
    assert invoke("optimizer/signum") == 0
    assert invoke("schedule/cosine") == 0
    assert "nothing is claimed" in capsys.readouterr().out


VERDICT = {"arm": "signum", "control": "adamw", "word": "holds", "effect": -1.0, "low": -1.1, "high": -0.9, "text": "lower"}


def test_one_part_or_all_of_them(place, capsys):
    assert invoke() == 2
    assert invoke("optimizer/lion", "--all") == 2
    assert "name one part, or give --all" in capsys.readouterr().err


# --- all ------------------------------------------------------------------------------------------------------


def test_all_begins_with_what_has_no_finding_then_the_oldest(place, monkeypatch):
    for name in ("lion", "signum", "adafactor"):
        claiming(monkeypatch, f"optimizer/{name}")
    for age, name in enumerate(("signum", "lion")):
        path = place.root / "findings" / "optimizer" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.utime(path, (1000 + age, 1000 + age))
    order = [i.name for i in stalest("optimizer") if i.name in ("lion", "signum", "adafactor")]
    assert order == ["adafactor", "signum", "lion"]


@pytest.mark.parametrize(("minutes", "expected"), [(1.0, 1), (2.5, 2), (100.0, 3)])
def test_all_starts_nothing_that_would_end_too_late(place, monkeypatch, minutes, expected):
    """Each study takes a minute of this clock."""
    clock = SimpleNamespace(now=0.0)
    clock.monotonic = lambda: clock.now
    monkeypatch.setattr(checking, "time", clock)
    monkeypatch.setattr(checking, "stalest", lambda kind=None: [SimpleNamespace(id=f"optimizer/{n}") for n in "abc"])

    def one(id, **_):
        clock.now += 60.0
        return checking.Checked(id, (), None, None)

    monkeypatch.setattr(checking, "check", one)
    told = []
    done = check_all(minutes, each=told.append)
    assert [c.name for c in done] == [c.name for c in told] == [f"optimizer/{n}" for n in "abc"[:expected]]


def test_all_through_the_command(place, monkeypatch, capsys):
    monkeypatch.setattr(checking, "stalest", lambda kind=None: [SimpleNamespace(id="schedule/cosine")])
    assert invoke("--all", "--minutes", "5", "--json") == 0
    assert [c["part"] for c in json.loads(capsys.readouterr().out)] == ["schedule/cosine"]
    monkeypatch.setattr(checking, "stalest", lambda kind=None: [])
    assert invoke("--all") == 2
