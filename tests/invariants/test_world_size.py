"""P12 over processes: DDP does what one process does, also where examples cannot be dealt evenly.

Bugs it is meant to catch: a mean over processes of unequal shares, an order that depends on the world, a last step in which a
process without an example leaves the others waiting, metrics of the first process only.
"""

import json

import pytest
from processes import launched
from safetensors.torch import load_file

from metier.core.api import train

SCRIPT = """
import json, sys
from metier.core.api import train
train(json.loads(sys.argv[1]), out=sys.argv[2], quiet=True, handle_signals=False)
"""


def settings(data):
    return {
        "model": "lab/gpt2-1m", "data": {"train": str(data), "eval_fraction": 0.2}, "optimizer": {"adamw": {"lr": 1e-3}},
        "schedule": "constant", "train": {"epochs": 1, "batch": 6, "seed": 3, "device": "cpu"},
    }  # fmt: skip


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_do_what_one_does(tmp_path, world):
    """19 examples in steps of 6: the last step has one."""
    data = tmp_path / "rows.jsonl"
    rows = [{"prompt": "a b c " * (i % 4 + 1), "completion": "x y " * (i % 7 + 1)} for i in range(24)]
    data.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    alone = train(settings(data), out=tmp_path / "alone", quiet=True, handle_signals=False)
    trained(tmp_path, settings(data), world)
    _same(tmp_path, alone, 5)


@pytest.mark.parametrize(("objective", "length"), [("kto", {"epochs": None, "steps": 4}), ("aot", {"epochs": 1})])
def test_a_loss_of_the_whole_step_sees_all_processes(tmp_path, objective, length):
    """kto reads each answer on its own and an answer of another prompt; the last step of aot's epoch has one pair."""
    data = tmp_path / "rows.jsonl"
    rows = [{"prompt": "a b c " * (i % 4 + 1), "chosen": "x y " * (i % 7 + 1), "rejected": "z " * (i % 5 + 1)} for i in range(24)]
    data.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    run = {
        **settings(data),
        "objective": {objective: {"beta": 0.5}},
        "train": {**settings(data)["train"], **length},
    }
    alone = train(run, out=tmp_path / "alone", quiet=True, handle_signals=False)
    trained(tmp_path, run, 2)
    _same(tmp_path, alone, 5)


def trained(tmp_path, run, world):
    script = tmp_path / "run.py"
    script.write_text(SCRIPT, encoding="utf-8")
    done = launched([script, json.dumps(run), tmp_path / "together"], world)
    assert done.returncode == 0, done.stderr[-3000:]


def _same(tmp_path, alone, events):
    a, b = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("alone", "together"))
    for name in a:
        assert (a[name] - b[name]).abs().max() < 1e-5, name
    lines = (tmp_path / "together" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [e for e in map(json.loads, lines) if e["event"] in ("step", "eval")]
    mine = [e for e in alone.events if e["event"] in ("step", "eval")]
    assert len(steps) == len(mine) == events
    for x, y in zip(mine, steps, strict=True):
        for key in {"loss", "eval_loss", "units", "tokens", "grad_norm", "step"} & x.keys():
            assert x[key] == pytest.approx(y[key], rel=1e-4), key
