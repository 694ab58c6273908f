"""SIGTERM and death of a comparison's process: no worker is left behind, and the same command continues."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

DESIGN = {
    "name": "stopped",
    "run": {
        "model": "lab/llama-50k",
        "data": {"train": "lab/pydoc", "limit": 12, "chunk": True, "max_length": 32, "eval_fraction": 0.2, "eval_limit": 4},
        "schedule": "constant",
        "train": {"batch": 4, "steps": 8},
    },
    "control": "a",
    "arms": {"a": {"optimizer": {"adamw": {"lr": 1e-3}}}, "b": {"optimizer": {"adamw": {"lr": 1e-2}}}},
    "tune": {"factors": [0.5, 1.0], "widen": 1},
    "seeds": 1,
    "parallel": 2,
}
PROGRAM = """
import time, sys
from metier.compare.pool import run_jobs

def nap(path):
    open(path, "w").close()
    time.sleep(600)

if __name__ == "__main__":
    for _ in run_jobs(sys.argv[1:], parallel=1, crashed=lambda job, why: None, run=nap):
        pass
"""
"""A job that never ends, in a program of its own."""


def started(argv, **changes):
    """A new process with its own group, so that a signal to it reaches nobody else."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(argv, env=env, text=True, stdout=-1, stderr=subprocess.STDOUT, start_new_session=True, **changes)


def until(condition, process, seconds=90):
    """Wait for something that a process does."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.02)


def left(children, seconds=5):
    """Those of some processes that are still there after a few seconds."""
    return psutil.wait_procs(children, timeout=seconds)[1]


@pytest.fixture
def napping(tmp_path):
    """A process with a worker in the middle of its job, and its children."""
    (tmp_path / "program.py").write_text(PROGRAM)
    process = started([sys.executable, str(tmp_path / "program.py"), str(tmp_path / "begun")])
    until((tmp_path / "begun").exists, process)
    children = psutil.Process(process.pid).children(recursive=True)
    assert children
    yield process, children
    for each in [*children, process]:
        if each.is_running() if isinstance(each, psutil.Process) else each.poll() is None:
            each.kill()
    process.communicate()


@pytest.mark.parametrize(("number", "group", "code"), [
    (signal.SIGTERM, True, 143), (signal.SIGKILL, False, -9), (signal.SIGINT, False, -2),
])  # fmt: skip
def test_no_worker_outlives_the_process_that_started_it(napping, number, group, code):
    process, children = napping
    (os.killpg if group else os.kill)(process.pid, number)
    said = process.communicate(timeout=20)[0]
    assert process.returncode == code, said
    assert not left(children)
    assert ("finished runs are kept" in said) == (number == signal.SIGTERM)


def test_a_comparison_stopped_by_sigterm_goes_on(tmp_path):
    path, folder = tmp_path / "design.yaml", tmp_path / "out"
    path.write_text(json.dumps(DESIGN))  # JSON is YAML
    argv = [sys.executable, "-m", "metier", "compare", str(path), "--out", str(folder)]
    process = started(argv)
    until(lambda: list(folder.rglob("result.json")), process)
    children = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGTERM)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 143, said
    assert "at most 1 further for an arm whose best optimizer.lr is at an edge: 6 to 8 runs" in said
    assert "Traceback" not in said
    assert not left(children)
    kept = {p: p.stat().st_mtime_ns for p in folder.rglob("result.json")}
    assert 0 < len(kept) < 8
    assert not (folder / "comparison.json").exists()
    again = subprocess.run(argv, capture_output=True, text=True, timeout=300, check=False)
    assert again.returncode == 0, again.stderr
    assert {p: p.stat().st_mtime_ns for p in kept} == kept
    found = json.loads((folder / "comparison.json").read_text())
    assert {r["status"] for r in found["runs"]} == {"done"}
    assert [len(t["values"]) for t in found["tuning"]] == [3, 3]
    assert len(list(Path(folder).rglob("result.json"))) == 8
