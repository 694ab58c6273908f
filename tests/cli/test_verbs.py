"""The verbs as people type them: what they print, where, and with which exit code."""

import ast
import importlib.util
import json
import os
import pty
import re
import subprocess
import sys

import pytest

from metier.cli import VERBS, main
from metier.core import part
from metier.core.api import train

RUN = """\
model: lab/llama-50k
data: {train: lab/pydoc, limit: 12, chunk: true, max_length: 32, eval_fraction: 0.2, eval_limit: 4}
optimizer:
  adamw:
    lr: 1e-2
train:
  steps: 2
  batch: 4
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a run file, two runs, and a comparison."""
    from metier.compare import run as runner
    from metier.compare.api import compare
    from metier.compare.jobs import execute

    root = tmp_path_factory.mktemp("made")
    (root / "run.yaml").write_text(RUN)
    for name, more in (("a", []), ("b", ["optimizer.lr=1e-3"])):
        train(root / "run.yaml", more, out=root / "runs" / name, quiet=True)
    patch = pytest.MonkeyPatch()
    patch.setattr(runner, "run_jobs", lambda todo, **_: ((job, execute(job)) for job in todo))
    design = {
        "run": {"model": "lab/llama-50k", "train": {"steps": 1, "batch": 4}, "data": {
            "train": "lab/pydoc", "limit": 12, "chunk": True, "max_length": 32, "eval_fraction": 0.2, "eval_limit": 4}},
        "control": "b", "tune": None, "seeds": 2,
        "arms": {"a": {"optimizer": {"adamw": {"lr": 1e-2}}}, "b": {"optimizer": {"adamw": {"lr": 1e-4}}}},
    }  # fmt: skip
    compare(design, out=root / "comparisons" / "c", quiet=True)
    patch.undo()
    return root


@pytest.fixture
def say(capsys, made, monkeypatch):
    """Call the command line in the folder ``made``; returns (exit code, stdout, stderr)."""
    monkeypatch.chdir(made)

    def call(*argv):
        with pytest.raises(SystemExit) as e:
            main([str(a) for a in argv])
        out = capsys.readouterr()
        return e.value.code, out.out, out.err

    return call


# --- reading verbs ----------------------------------------------------------------------------------------------

READING = {
    "list": ["list"],
    "list of a kind": ["list", "optimizer", "sign"],
    "show a part": ["show", "optimizer/lion"],
    "show a row": ["show", "6"],
    "show a card": ["show", "optimizer-anatomy"],
    "rows": ["rows"],
    "rows of a status": ["rows", "--status", "partial"],
    "runs": ["runs"],
    "two runs": ["runs", "runs/a", "runs/b"],
    "report of a run": ["report", "runs/a"],
    "report of a comparison": ["report", "comparisons/c"],
    "doctor": ["doctor"],
    "plan": ["plan", "run.yaml"],
    "plan without a step": ["plan", "run.yaml", "--no-step"],
    "eval of a run": ["eval", "runs/a"],
    "eval of a run file": ["eval", "run.yaml", "optimizer.lr=0.1"],
    "train": ["train", "run.yaml", "--out", "runs/a"],
}


@pytest.mark.parametrize("case", READING)
def test_json_is_json_and_nothing_else_is_printed(say, case):
    code, out, _ = say(*READING[case], "--json")
    assert code == 0
    found = json.loads(out)
    assert found


@pytest.mark.parametrize("case", [c for c in READING if not c.startswith("report")])
def test_output_without_a_terminal_is_plain(say, case):
    code, out, err = say(*READING[case])
    assert code == 0
    assert out.strip()
    assert "\x1b" not in out + err
    assert not re.search(r"[┃━╭│]", out)


def on_terminal(*argv, **env):
    """The same in a terminal of its own; returns (exit code, output)."""
    ours, theirs = pty.openpty()
    given = {**os.environ, "TERM": "xterm-256color", **env}
    process = subprocess.Popen([sys.executable, "-m", "metier", *argv], stdout=theirs, stderr=theirs, env=given, close_fds=True)
    os.close(theirs)
    out = b""
    while True:
        try:
            read = os.read(ours, 1 << 16)
        except OSError:
            break
        if not read:
            break
        out += read
    os.close(ours)
    return process.wait(), out.decode()


def test_no_color_is_respected_in_a_terminal():
    code, out = on_terminal("list", "schedule", NO_COLOR="1")
    assert code == 0
    assert "schedule/cosine" in out
    assert "\x1b" not in out


def test_a_list_holds_one_part_per_line_for_other_programs(say):
    _, out, _ = say("list", "optimizer")
    assert [line.split()[0] for line in out.splitlines()] == [i.id for i in part.listing() if i.kind == "optimizer"]


def test_the_difference_of_two_runs_is_what_differs(say):
    _, out, _ = say("runs", "runs/a", "runs/b", "--json")
    found = {r["key"]: (r["first"], r["second"]) for r in json.loads(out)}
    assert found["run.optimizer.adamw.lr"] == (0.01, 0.001)
    assert "run.train.batch" not in found
    assert "run.model" not in found


def test_runs_lists_runs_and_comparisons(say):
    _, out, _ = say("runs", "--json")
    found = {r["folder"]: r for r in json.loads(out)}
    assert found["runs/a"]["status"] == "done"
    assert found["runs/a"]["step"] == "2/2"
    assert "eval_loss" in found["runs/a"]["result"]
    assert found["comparisons/c"]["what"] == "comparison"
    assert say("runs", "--root", "nowhere")[:2] == (0, "no runs under nowhere\n")
    assert json.loads(say("runs", "--root", "nowhere", "--json")[1]) == []


def test_a_run_with_a_value_that_was_not_finite_is_listed(say, tmp_path):
    (tmp_path / "x").mkdir()
    record = {"status": "done", "step": 1, "steps": 1, "metrics": {"loss": None, "eval_loss": 2.0}}
    (tmp_path / "x" / "run.json").write_text(json.dumps(record))
    code, out, _ = say("runs", "--root", tmp_path)
    assert code == 0
    assert "eval_loss 2" in out


def test_a_report_is_written_where_it_is_wanted(say, tmp_path):
    for folder in ("runs/a", "comparisons/c"):
        code, out, _ = say("report", folder, "--out", tmp_path / "page.html")
        assert (code, out.strip()) == (0, str(tmp_path / "page.html"))
        page = (tmp_path / "page.html").read_text()
        assert "<svg" in page
        assert "http://" not in page.replace("http://www.w3.org", "")


# --- mistakes ---------------------------------------------------------------------------------------------------

MISTAKES = {
    "unknown verb": (["trian"], 2, r"unknown verb 'trian'.*Did you mean 'train'"),
    "unknown option": (["list", "--jsn"], 2, r"No such option.*--json"),
    "missing argument": (["train"], 2, r"(?i)missing argument"),
    "missing file": (["train", "rum.yaml"], 2, r"no such file: rum.yaml.*run.yaml"),
    "missing file to plan": (["plan", "none.yaml"], 2, r"no such file: none.yaml"),
    "bad override": (["train", "run.yaml", "train.steps"], 2, r"'train.steps' is not of the form key=value"),
    "unknown key": (["train", "run.yaml", "train.stpes=3"], 2, r"override train.stpes=3.*unknown key.*Did you mean 'steps'"),
    "wrong type": (["train", "run.yaml", "train.steps=many"], 2, r"steps = 'many': "),
    "out of range": (["plan", "run.yaml", "optimizer.lr=-1"], 2, r"lr = -1: input should be greater than 0"),
    "unknown part": (["train", "run.yaml", "optimizer=lino"], 2, r"unknown optimizer 'lino'.*Did you mean 'lion'"),
    "unknown model": (["plan", "run.yaml", "model=lab/lama-50k"], 2, r"lab/llama-50k"),
    "show nothing": (["show", "optimizer/loin"], 2, r"optimizer/lion"),
    "show a row that is not there": (["show", "99999"], 2, r"99999"),
    "unknown status": (["rows", "--status", "done"], 2, r"unknown status 'done'.*works"),
    "one run to compare": (["runs", "runs/a"], 2, r"name two run folders"),
    "no run folder": (["runs", "runs/a", "runs/z"], 2, r"runs/z is not a run folder"),
    "no report": (["report", "runs"], 2, r"runs holds neither run.json nor comparison.json"),
    "nothing to evaluate": (["eval", "lab/llama-50k"], 2, r"needs data.*--data FILE"),
    "bad number": (["eval", "runs/a", "--limit", "0"], 2, r"--limit"),
    "mixed kinds": (["compare", "optimizer/lion", "schedule/cosine"], 2, r"parts of one kind"),
    "unknown design": (["compare", "none.yaml"], 2, r"no such file: none.yaml"),
    "check nothing": (["check"], 2, r"name one part, or give --all"),
    "unknown kind": (["new", "optimiser", "x"], 2, r"Did you mean 'optimizer'"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_end_in_one_message_and_the_code_for_usage(say, case):
    argv, code, message = MISTAKES[case]
    got, out, err = say(*argv)
    assert got == code
    assert out == ""
    assert re.search(message, err, re.DOTALL), err
    assert err.startswith("metier: ")
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("  steps: 2", "  stepps: 2", r"run\.yaml:7 train\.stepps: unknown key in train 'stepps'.*'steps'"),
        ("    lr: 1e-2", "    rl: 1e-2", r"run\.yaml:5 optimizer\.adamw\.rl: unknown option of optimizer/adamw 'rl'.*'lr'"),
        ("model: ", "modle: ", r"run\.yaml:1 modle: unknown key in the run file 'modle'.*'model'"),
        ("  batch: 4", "  batch: four", r"run\.yaml:8 train\.batch: batch = 'four': "),
        ("  batch: 4", "  batch: 4\n  batch: 5", r"run\.yaml:9"),
        ("  batch: 4", "  batch: [4", r"run\.yaml:9"),
    ],
)
def test_mistakes_in_the_file_are_shown_with_their_line(say, tmp_path, old, new, message):
    path = tmp_path / "run.yaml"
    path.write_text(RUN.replace(old, new))
    for verb in ("train", "plan", "eval"):
        code, out, err = say(verb, path)
        assert (code, out) == (2, "")
        assert re.search(message, err, re.DOTALL), err


def test_a_failure_that_is_not_a_wrong_request_is_code_one(say, tmp_path):
    nan = ["optimizer=sgd-momentum", "optimizer.lr=1e30", "train.clip=null", "train.steps=5"]
    code, _, err = say("train", "run.yaml", "--out", tmp_path / "run", "--quiet", *nan)
    assert code == 1
    assert re.search("metier: .*not finite|metier: loss", err)


def test_a_defect_shows_its_trace(say, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr("metier.cli.list_.table", broken)
    with pytest.raises(ZeroDivisionError):
        main(["list"])


# --- help -------------------------------------------------------------------------------------------------------


def test_the_bare_command_prints_its_help(say):
    code, out, err = say()
    assert (code, out) == (2, "")
    assert err.startswith("Usage: metier")
    assert all(re.search(rf"^\s+{verb}\s", err, re.MULTILINE) for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb(say, verb):
    code, out, _ = say(verb, "--help")
    assert code == 0
    assert out.startswith("Usage: metier " + verb)
    assert say(verb, "-h")[1] == out


# --- new --------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path):
    for kind in part.KINDS:
        (tmp_path / "src" / "metier" / "parts" / kind).mkdir(parents=True)
        (tmp_path / "tests" / "parts" / kind).mkdir(parents=True)
    return tmp_path


@pytest.fixture
def registered(monkeypatch):
    """Make the part in a file known, as if it stood in the package."""
    modules = []

    def register(path, kind):
        module = f"metier.parts.{kind}.{path.stem}"
        spec = importlib.util.spec_from_file_location(module, path)
        loaded = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, module, loaded)
        spec.loader.exec_module(loaded)
        known = (*part.listing(), *part.read_file(path, module))
        monkeypatch.setattr(part, "listing", lambda: known)
        modules.append(module)

    return register


@pytest.mark.parametrize("kind", part.KINDS)
def test_a_new_part_passes_the_contract_of_its_kind(say, checkout, registered, kind):
    from metier.testing import check_part

    code, out, _ = say("new", kind, "my-trick", "--root", checkout)
    made, test = (checkout / line for line in out.splitlines()[:2])
    assert code == 0
    assert made == checkout / "src" / "metier" / "parts" / kind / "my_trick.py"
    assert test == checkout / "tests" / "parts" / kind / "test_my_trick.py"
    (listed,) = part.read_file(made, "x")
    assert (listed.id, listed.summary != "") == (f"{kind}/my-trick", True)
    registered(made, kind)
    assert check_part(f"{kind}/my-trick")
    names = {n.name for n in ast.walk(ast.parse(test.read_text())) if isinstance(n, ast.FunctionDef)}
    assert names == {"test_contract", "test_oracle"}
    assert f'check_part("{kind}/my-trick")' in test.read_text()


def test_new_parts_have_no_blank_left_and_pass_the_linter(say, checkout):
    for kind in part.KINDS:
        say("new", kind, "my-trick", "--root", checkout)
    for path in checkout.rglob("*.py"):
        assert not re.search(r"\{(kind|name|stem|Class)\}", path.read_text())
    config = str(importlib.util.find_spec("metier").origin).split("/src/")[0] + "/pyproject.toml"
    # Which imports are the project's own can only be told in a checkout.
    command = [sys.executable, "-m", "ruff", "check", "--config", config, "--ignore", "I001", str(checkout / "src")]
    ruff = subprocess.run(command, capture_output=True, text=True)
    if "No module named" in ruff.stderr:
        pytest.skip("ruff is not installed")
    assert ruff.returncode == 0, ruff.stdout


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["optimizer", "lion"], "optimizer/lion exists already"),
        (["schedule", "two words"], "is not a part name"),
        (["schedule", "../up"], "is not a part name"),
        (["schedule", "9lives"], "is not a part name"),
        (["schedule", "lambda"], "cannot be the name of a function"),
        (["schedule", "fine", "--root", "nowhere"], "no folder nowhere"),
    ],
)
def test_new_refuses(say, checkout, argv, message):
    code, _, err = say("new", *argv, *([] if "--root" in argv else ["--root", checkout]))
    assert code == 2
    assert message in err
    assert not list(checkout.rglob("*.py"))


def test_new_overwrites_nothing(say, checkout):
    say("new", "hook", "mine", "--root", checkout)
    path = checkout / "src" / "metier" / "parts" / "hook" / "mine.py"
    path.write_text("kept")
    assert say("new", "hook", "mine", "--root", checkout)[0] == 2
    assert path.read_text() == "kept"
