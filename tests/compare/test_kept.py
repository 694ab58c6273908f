"""The folder of a study: figures of other code are never used, time is summed, somebody's files are left alone.

Bugs it is meant to catch: figures read back after the study, a part it names only as a text, or a module it imports inside a
function has changed; a comment that throws figures away; the time of the last call only; time lost when a call fails.
"""

import json
import time
from pathlib import Path

import pytest

from metier.compare import kept as books
from metier.compare import study
from metier.compare.kept import kept, sources, stamp
from metier.compare.study import Check, Outcome
from metier.core import part
from metier.core.errors import UsageError


def test_a_folder_of_the_same_code_goes_on(tmp_path):
    folder = tmp_path / "s"
    with kept(folder, "a"):
        (folder / "figures.json").write_text("1")
    with kept(folder, "a"):
        assert (folder / "figures.json").is_file()
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


@pytest.mark.parametrize("times", [1, 2])
def test_a_folder_of_other_code_is_set_aside(tmp_path, capsys, times):
    folder = tmp_path / "s"
    for code in "abc"[: times + 1]:
        with kept(folder, code):
            assert [p.name for p in folder.iterdir()] == [books.NAME]
            (folder / "figures.json").write_text(code)
    olds = [tmp_path / f"s.other-code-{i + 1}" for i in range(times)]
    assert [(p / "figures.json").read_text() for p in olds] == list("ab"[:times])
    said = capsys.readouterr().out
    assert all(str(p) in said for p in olds)


def test_a_folder_that_says_nothing_is_set_aside_only_where_it_is_the_studys_own(tmp_path, capsys):
    folder = tmp_path / "s"
    folder.mkdir()
    (folder / "letters.txt").write_text("mine")
    with pytest.raises(UsageError, match="no study made"), kept(folder, "a", own=False):
        pass
    assert (folder / "letters.txt").is_file()
    with kept(folder, "a", quiet=True):
        assert not (folder / "letters.txt").exists()
    assert (tmp_path / "s.other-code-1" / "letters.txt").read_text() == "mine"
    assert not capsys.readouterr().out


def test_a_broken_record_is_other_code(tmp_path):
    folder = tmp_path / "s"
    with kept(folder, "a"):
        pass
    (folder / books.NAME).write_text("{")
    with kept(folder, "a", quiet=True) as used:
        assert used.before == 0
    assert (tmp_path / "s.other-code-1").is_dir()


def test_seconds_are_summed_over_calls_that_fail_too(tmp_path):
    folder = tmp_path / "s"
    with pytest.raises(RuntimeError), kept(folder, "a"):
        time.sleep(0.3)
        raise RuntimeError
    with kept(folder, "a") as used:
        assert used.before == pytest.approx(0.3, abs=0.15)
        time.sleep(0.3)
    assert json.loads((folder / books.NAME).read_text())["seconds"] == pytest.approx(0.6, abs=0.25)
    with kept(folder, "b", quiet=True) as used:
        assert used.before == 0


def test_time_is_written_while_a_call_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(books, "BEAT", 0.02)
    with kept(tmp_path / "s", "a"):
        time.sleep(0.4)
        assert json.loads((tmp_path / "s" / books.NAME).read_text())["seconds"] > 0.1


def test_sources_are_all_that_figures_depend_on():
    found = {str(p.relative_to(books.PACKAGE)) for p in sources([study.HOME / "kto.py", Path(part.find("objective/kto").path)])}
    wanted = {
        "studies/kto.py", "studies/_arms.py", "lab/preferencebench.py", "core/loop.py", "core/klestimate.py",
        "parts/objective/kto.py", "parts/optimizer/adamw.py", "parts/schedule/cosine.py", "compare/run.py",
    }  # fmt: skip
    assert wanted <= found
    assert not {"compare/kept.py", "catalog/hashing.py", "parts/objective/simpo.py", "cli/check.py"} & found


def test_the_stamp_knows_code_packages_and_size_but_no_comments(tmp_path, monkeypatch):
    path = tmp_path / "code.py"
    path.write_text("a = 1\n")
    first = stamp([path], quick=False)
    assert stamp([path], quick=True) != first
    path.write_text("# one\na = 1\n")
    assert stamp([path], quick=False) == first
    path.write_text("a = 2\n")
    assert stamp([path], quick=False) != first
    path.write_text("a = 1\n")
    monkeypatch.setattr(books, "environment", lambda: {"packages": {"torch": "0"}})
    assert stamp([path], quick=False) != first


@pytest.fixture
def counted(monkeypatch):
    """A study that keeps a figure, and how often it computed it."""

    class Module:
        """Counts."""

        PARTS = ("optimizer/lion",)
        CLAIM = "It counts."
        computed = 0

        @classmethod
        def run(cls, given):
            path = given.folder / "figure.json"
            if not path.is_file():
                cls.computed += 1
                path.write_text("1")
            return Outcome([Check("a", "1", 1, True)])

    monkeypatch.setattr(study, "load", lambda name: Module)
    return Module


def test_a_study_reads_back_only_what_its_own_code_computed(counted, monkeypatch, tmp_path):
    folder = tmp_path / "s"
    for _ in range(2):
        study.run("made-up", quick=True, folder=folder)
    assert counted.computed == 1
    monkeypatch.setattr(study, "stamp", lambda files, quick: "other")
    _, place = study.run("made-up", quick=True, folder=folder, quiet=True)
    assert counted.computed == 2
    assert json.loads(place.read_text())["notes"] == []


def test_a_change_of_code_while_a_study_runs_is_told_and_its_folder_not_used_again(counted, monkeypatch, tmp_path):
    codes = iter("ab" + "bb")
    monkeypatch.setattr(study, "stamp", lambda files, quick: next(codes))
    _, place = study.run("made-up", quick=True, folder=tmp_path / "s", quiet=True)
    assert json.loads(place.read_text())["notes"] == [study.CHANGED]
    study.run("made-up", quick=True, folder=tmp_path / "s", quiet=True)
    assert counted.computed == 2


def test_a_finding_has_the_seconds_of_all_calls(counted, monkeypatch, tmp_path):
    study.run("made-up", quick=True, folder=tmp_path / "s")
    record = tmp_path / "s" / books.NAME
    record.write_text(json.dumps(json.loads(record.read_text()) | {"seconds": 100.0}))
    _, place = study.run("made-up", quick=True, folder=tmp_path / "s")
    assert 100 <= json.loads(place.read_text())["seconds"] < 110
