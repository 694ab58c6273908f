"""``metier logic``, ``metier suggest`` and ``metier list --where``: what they print, as text and as JSON."""

import json

import pytest

from metier.cli import main


def call(capsys, *argv):
    with pytest.raises(SystemExit) as e:
        main([*map(str, argv)])
    out = capsys.readouterr()
    return e.value.code, out.out, out.err


def read(capsys, *argv):
    code, out, err = call(capsys, *argv, "--json")
    assert code == 0, err
    return json.loads(out)


def test_explain(capsys):
    found = read(capsys, "logic", "explain", "orpo")
    assert (found["code"], found["strict"], found["reference"]) == (".+-.", True, False)
    assert found["ratio"] == "pw*(1-pl)/(pl*(1-pw))"
    code, out, _ = call(capsys, "logic", "explain", "orpo")
    assert code == 0
    assert "code: .+-.\n" in out
    assert "strict: True" in out


def test_a_code_is_a_program_too(capsys):
    assert read(capsys, "logic", "explain", ".+-.") == read(capsys, "logic", "explain", "orpo")
    code, out, _ = call(capsys, "logic", "explain", "--json", "--", "-+*.")
    assert code == 0
    assert json.loads(out)["code"] == "-+*."


@pytest.mark.parametrize(
    ("ratio", "name"), [("pw*(1-pl)/(pl*(1-pw))", "orpo"), ("pw/pl", "cpo"), ("pw*rl/(rw*pl)", "dpo"), ("pw/(1-pw)", "ce")]
)
def test_decompile(capsys, ratio, name):
    found = read(capsys, "logic", "decompile", ratio)
    assert (found["name"], found["ratio"]) == (name, ratio)


@pytest.mark.parametrize(("flags", "number"), [([], 210), (["--monotone"], 52), (["--strict"], 34)], ids=str)
def test_list(capsys, flags, number):
    found = read(capsys, "logic", "list", *flags)
    assert len(found) == number
    assert {"orpo", "cpo"} <= {f["name"] for f in found}
    code, out, _ = call(capsys, "logic", "list", *flags)
    assert code == 0
    assert len(out.splitlines()) == number + 1


def test_lattice(capsys):
    assert read(capsys, "logic", "lattice", "cpo", "orpo", "constrained") == [
        {"stricter": "*+-.", "than": "++-."},
        {"stricter": ".+-.", "than": "++-."},
    ]
    assert len(read(capsys, "logic", "lattice")) > 30


@pytest.mark.parametrize(
    ("argv", "message"),
    [(["explain", "orpp"], "orpo"), (["decompile", "pw*pw/pl"], "power 2"), (["decompile", "pw/"], "pw/"), (["explain", "...."], "prefers nothing")],
    ids=str,
)  # fmt: skip
def test_usage_errors(capsys, argv, message):
    code, _, err = call(capsys, "logic", *argv)
    assert code == 2
    assert message in err


# --- suggestions and records ----------------------------------------------------------------------------------


def test_suggest(capsys):
    found = read(capsys, "suggest", "objective", "--data", "single", "--noise", 0.3)
    assert found[0]["id"] == "objective/kto"
    assert set(found[0]) == {"id", "reason", "check"}
    assert len(read(capsys, "suggest", "--chosen-falling", "--limit", 3)) == 3
    code, out, _ = call(capsys, "suggest", "--length-bias")
    assert code == 0
    assert out.startswith("objective/ln-dpo\n  why ")
    for argv, nearest in ((["objektive"], "objective"), (["--data", "pair"], "pairs")):
        code, _, err = call(capsys, "suggest", *argv)
        assert code == 2
        assert nearest in err


def test_list_where(capsys):
    found = read(capsys, "list", "objective", "--where", "reference=free", "--where", "sft=merged")
    ids = {f["id"] for f in found}
    assert {"objective/orpo", "objective/cpo"} <= ids
    assert not ids & {"objective/dpo", "objective/simpo", "optimizer/adamw", "objective/lm"}
    assert all(f["traits"]["reference"] == "free" for f in found)
    code, out, _ = call(capsys, "list", "--where", "reference=free", "--where", "feedback=binary", "--where", "loop=offline")
    assert (code, out.splitlines()[0].split(";")[0]) == (0, "no part matches 'reference=free feedback=binary loop=offline'")
    code, out, _ = call(capsys, "list", "objective", "simpo", "--where", "length=mean")
    assert code == 0
    assert out.splitlines()[-1].startswith("objective/simpo")


@pytest.mark.parametrize(
    ("argv", "message"),
    [(["--where", "reference"], "field=value"), (["--where", "reference=fre"], "'free'"), (["--where", "refrence=free"], "reference"),
     (["optimizer", "--where", "reference=free"], "only objectives")],
    ids=str,
)  # fmt: skip
def test_bad_filters(capsys, argv, message):
    code, _, err = call(capsys, "list", *argv)
    assert code == 2
    assert message in err
