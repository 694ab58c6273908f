"""F36, F38: the same command gives the same log; reading verbs need neither home, terminal nor extras."""

import json
import os
import subprocess
import sys

import pytest
from runs import bare, go, outcome, rows, settings, write_rows

from metier.core import log

PROBE = "import sys; from metier.cli import main; main(sys.argv[1:])"


@pytest.fixture
def text(tmp_path):
    return write_rows(tmp_path / "text.jsonl", rows())


def test_the_same_run_twice_in_one_process(tmp_path, text):
    run = settings(text, train__eval_every=4, data__eval_fraction=0.2, hooks=["neftune"])
    for name in ("a", "b"):
        go(tmp_path / name, run)
    a, b = outcome(tmp_path / "a"), outcome(tmp_path / "b")
    assert a == b


def test_the_same_command_in_two_processes(tmp_path, text):
    """Under different hash seeds, so no result hangs on the order of a set."""
    run = tmp_path / "run.yaml"
    run.write_text(json.dumps(settings(text, train__eval_every=4, data__eval_fraction=0.2)))
    logs = []
    children = []
    for seed in ("0", "4242"):
        env = {**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", PROBE, "train", str(run), "--out", str(tmp_path / seed), "--quiet"]
        children.append(subprocess.Popen(command, env=env, stdout=-1, stderr=-1, text=True))
    for seed, child in zip(("0", "4242"), children, strict=True):
        _, err = child.communicate(timeout=300)
        assert child.returncode == 0, err
        logs.append([bare(e) for e in log.read(tmp_path / seed)])
    assert logs[0] == logs[1]
    assert len(logs[0]) > 12


@pytest.mark.parametrize("argv", [["list"], ["rows"], ["list", "--json"], ["--help"], ["--version"]])
def test_reading_verbs_in_a_bare_environment(tmp_path, argv):
    """No home, no terminal, no locale, no optional package, nothing heavy imported."""
    block = (
        "import sys\n"
        "for name in 'torch transformers tensorboard wandb trackio ray vllm lm_eval'.split():\n"
        "    sys.modules[name] = None\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", block + PROBE, *argv], env={"PATH": "/nowhere"}, cwd=tmp_path,
        stdin=subprocess.DEVNULL, capture_output=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout


def test_output_into_a_closed_pipe(tmp_path):
    """F27: ``metier list | head -1``."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", PROBE, "list"], stdout=write, stderr=subprocess.PIPE, cwd=tmp_path, timeout=120)
    os.close(write)
    assert done.returncode in (0, 1)
    assert b"Traceback" not in done.stderr
    assert b"BrokenPipe" not in done.stderr


def test_training_with_stderr_closed(tmp_path, text):
    """F27: the reader of the progress went away."""
    run = tmp_path / "run.yaml"
    run.write_text(json.dumps(settings(text, train__steps=3)))
    read, write = os.pipe()
    os.close(read)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PROBE, "train", str(run), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=write, env=env, timeout=300)
    os.close(write)
    assert done.returncode == 0
    assert b"done at step 3" in done.stdout
