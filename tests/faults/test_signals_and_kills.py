"""F5–F7: real processes killed, terminated or interrupted; what they leave is complete and goes on (P2, P7)."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import assert_same, outcome, rows, settings, write_rows

from metier.core import log, state


class Server:
    """Starts ``metier train`` in forked processes; see ``forkserver.py``."""

    def __init__(self) -> None:
        path = Path(__file__).with_name("forkserver.py")
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen([sys.executable, str(path)], stdin=-1, stdout=-1, text=True, env=env)
        assert self.line() == "ready"

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def start(self, run: Path, folder: Path, inject: dict | None = None) -> int:
        """The pid of a new run."""
        argv = ["train", str(run), "--out", str(folder)]
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"argv": argv, "log": str(folder) + ".txt", "inject": inject}) + "\n")
        self.process.stdin.flush()
        return int(self.line())

    def wait(self) -> int:
        """The exit code of the run, negative for a signal."""
        return int(self.line())

    def train(self, run: Path, folder: Path, inject: dict | None = None) -> int:
        self.start(run, folder, inject)
        return self.wait()


@pytest.fixture(scope="module")
def server():
    made = Server()
    yield made
    assert made.process.stdin is not None
    made.process.stdin.close()
    made.process.wait(timeout=30)


@pytest.fixture(scope="module")
def reference(tmp_path_factory, server):
    """Run file, what it must come to, and its seconds."""
    root = tmp_path_factory.mktemp("reference")
    data = write_rows(root / "text.jsonl", rows())
    run = root / "run.yaml"
    # JSON is YAML.
    run.write_text(json.dumps(settings(data, train__save_every=2, train__eval_every=4, data__eval_fraction=0.2)))
    began = time.monotonic()
    assert server.train(run, root / "out") == 0, (root / "out.txt").read_text()
    return run, outcome(root / "out"), time.monotonic() - began


def said(folder: Path) -> str:
    return Path(f"{folder}.txt").read_text()


def test_killed_at_forty_moments(tmp_path, server, reference):
    """F5."""
    run, expected, seconds = reference
    rng = random.Random(0)
    killed = 0
    for i in range(40):
        folder = tmp_path / f"{i}"
        pid = server.start(run, folder)
        time.sleep(seconds * (i + rng.random()) / 40)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        killed += server.wait() == -signal.SIGKILL
        found = state.find(folder / "checkpoints")
        logged = [e["step"] for e in log.read(folder) if e["event"] == "checkpoint"]
        assert (found is not None and state.read(found).step >= max(logged)) if logged else True
        assert server.train(run, folder) == 0, said(folder)
        assert_same(outcome(folder), expected)
    assert killed >= 20


@pytest.mark.parametrize(("where", "n"), [
    ("start", 1), ("forward", 1), ("forward", 6), ("save", 1), ("save", 3), ("save", 7), ("rename", 1),
    ("rename", 2),     ("eval", 1), ("eval", 3),
])  # fmt: skip
def test_terminated(tmp_path, server, reference, where, n):
    """F6: before step 1, during a forward pass, a save, an evaluation."""
    run, expected, _ = reference
    folder = tmp_path / "run"
    code = server.train(run, folder, {"where": where, "n": n, "number": signal.SIGTERM, "times": 1})
    finished = where == "eval" and n == 3  # the last evaluation comes after the last step
    assert code == (0 if finished else 128 + signal.SIGTERM), said(folder)
    assert "SIGTERM: stopping after this step" in said(folder)
    record = json.loads((folder / "run.json").read_text())
    assert record["status"] == ("done" if finished else "interrupted")
    found = state.find(folder / "checkpoints")
    assert found is not None
    assert state.read(found).step == record["step"]
    assert not (folder / "lock").exists()
    assert server.train(run, folder) == 0, said(folder)
    assert_same(outcome(folder), expected)


@pytest.mark.parametrize(("where", "n"), [("start", 1), ("forward", 6), ("save", 5), ("eval", 2)])
def test_interrupted_once(tmp_path, server, reference, where, n):
    """F7: Ctrl-C."""
    run, expected, _ = reference
    folder = tmp_path / "run"
    code = server.train(run, folder, {"where": where, "n": n, "number": signal.SIGINT, "times": 1})
    assert code == 130, said(folder)
    assert "the checkpoint is complete" in said(folder)
    assert server.train(run, folder) == 0, said(folder)
    assert_same(outcome(folder), expected)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(("where", "n"), [("forward", 6), *(("save", n) for n in range(6, 11)), ("rename", 2), ("eval", 2)])
def test_twice_ends_at_once_and_earlier_checkpoints_stay(tmp_path, server, reference, where, n, number):
    """F7: a second Ctrl-C does not wait for the step, nor for the save."""
    run, expected, _ = reference
    folder = tmp_path / "run"
    code = server.train(run, folder, {"where": where, "n": n, "number": number, "times": 2})
    assert code == (130 if number == signal.SIGINT else -signal.SIGTERM), said(folder)
    assert "Traceback" not in said(folder)
    saved = [e["step"] for e in log.read(folder) if e["event"] == "checkpoint"]
    found = state.find(folder / "checkpoints")
    assert saved
    assert found is not None
    assert state.read(found).step >= max(saved)
    assert server.train(run, folder) == 0, said(folder)
    assert_same(outcome(folder), expected)
    assert not list((folder / "checkpoints").glob(".*"))


def test_two_runs_of_one_folder(tmp_path, server, reference):
    """F24 as users meet it."""
    run, _, _ = reference
    from metier.core import lock

    with lock.run_folder(tmp_path / "run"):
        assert server.train(run, tmp_path / "run") == 2
        assert f"in use by process {os.getpid()}" in said(tmp_path / "run")
        assert [p.name for p in (tmp_path / "run").iterdir()] == ["lock"]
