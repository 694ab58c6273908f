"""The Python interface: the same run from a mapping, a file or a ``Run``; everything reachable from ``metier``."""

import subprocess
import sys

import pytest
import torch

import metier
from metier.core import config
from metier.core.errors import UsageError

RUN = {
    "model": "lab/llama-50k",
    "data": {"train": "lab/pydoc", "limit": 12, "chunk": True, "max_length": 32, "eval_fraction": 0.2, "eval_limit": 4},
    "optimizer": {"adamw": {"lr": 1e-2}},
    "train": {"steps": 2, "batch": 4},
}
FILE = """\
model: lab/llama-50k
data: {train: lab/pydoc, limit: 12, chunk: true, max_length: 32, eval_fraction: 0.2, eval_limit: 4}
optimizer: {adamw: {lr: 1e-2}}
train: {steps: 2, batch: 4}
"""


def losses(result):
    return [e["loss"] for e in result.events if e["event"] == "step"]


# --- train ----------------------------------------------------------------------------------------------------


def test_a_mapping_a_run_and_a_file_are_the_same_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(FILE)
    a = metier.train(RUN, out="a", quiet=True)
    b = metier.train(config.Run(**RUN), out="b", quiet=True)
    c = metier.train("mine.yaml", quiet=True)
    d = metier.train(tmp_path / "mine.yaml", ["train.steps=1"], out="d", quiet=True)
    assert losses(a) == losses(b) == losses(c)
    assert losses(d) == losses(a)[:1]
    assert c.folder.as_posix() == "runs/mine"
    assert (a.status, a.step, a.main, a.signal) == ("done", 2, True, None)
    assert a.metrics["eval_loss"] == pytest.approx([e for e in a.events if e["event"] == "eval"][-1]["eval_loss"])
    assert a.params == sum(p.numel() for p in metier.core.models.load("lab/llama-50k").model.parameters())
    assert a.state_bytes == 2 * 4 * a.params
    assert a.flops == 0.0
    assert a.peak_bytes > 0
    assert RUN["train"] == {"steps": 2, "batch": 4}


def test_the_folder_by_default(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert metier.train(RUN, quiet=True).folder.as_posix() == "runs/run"
    assert metier.train({**RUN, "out": "elsewhere"}, quiet=True).folder.as_posix() == "elsewhere"
    assert metier.train({**RUN, "out": "elsewhere"}, out="here", quiet=True).folder.as_posix() == "here"


def test_resume_and_restart(tmp_path):
    first = metier.train(RUN, out=tmp_path, quiet=True)
    longer = metier.train(RUN, ["train.steps=3", "schedule=constant"], out=tmp_path, quiet=True)
    assert losses(longer)[:2] == losses(first)
    assert longer.step == 3
    afresh = metier.train(RUN, ["train.steps=1"], out=tmp_path, quiet=True, resume=False)
    assert losses(afresh) == losses(first)[:1]
    assert [p.name for p in (tmp_path / "checkpoints").iterdir() if p.is_dir()] == ["step-00000001"]


def test_weights_are_left_out_on_request_and_flops_counted(tmp_path):
    done = metier.train(RUN, out=tmp_path, quiet=True, keep_weights=False, count_flops=True)
    assert done.flops > 0
    assert sorted(p.name for p in tmp_path.iterdir() if p.suffix in (".json", ".jsonl")) == ["metrics.jsonl", "run.json"]
    assert not list(tmp_path.rglob("*.safetensors"))
    assert not (tmp_path / "model").exists()


def test_a_failed_run_says_so_in_its_record(tmp_path):
    import json

    hot = ["optimizer=sgd-momentum", "optimizer.lr=1e30", "train.clip=null", "train.steps=5"]
    with pytest.raises(metier.core.guards.NonFiniteError):
        metier.train(RUN, hot, out=tmp_path, quiet=True)
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["status"] == "failed"
    assert "NonFiniteError" in record["error"]


# --- compare --------------------------------------------------------------------------------------------------


def test_compare_from_a_mapping_and_again_from_its_folder(tmp_path, monkeypatch):
    from metier.compare import run as runner
    from metier.compare.jobs import execute

    ran = []
    monkeypatch.setattr(runner, "run_jobs", lambda todo, **_: ((job, ran.append(job) or execute(job)) for job in todo))
    design = {
        "run": {**RUN, "train": {"steps": 1, "batch": 4}}, "control": "b", "tune": None, "seeds": 2,
        "arms": {"a": {"optimizer": {"adamw": {"lr": 1e-2}}}, "b": {"optimizer": {"lion": {"lr": 1e-3}}}},
    }  # fmt: skip
    for _ in range(2):  # the name is a function however often it is used, and whatever was imported
        result, folder = metier.compare(design, out=tmp_path / "c", quiet=True)
    assert folder == tmp_path / "c"
    assert len(ran) == 4
    assert [a.name for a in result.arms] == ["a", "b"]
    assert result.control.name == "b"
    with pytest.raises(UsageError, match="at least two arms"):
        metier.compare({**design, "arms": {"b": {}}}, quiet=True)


IMPORTS = ["import metier.compare.design", "from metier.compare import api", "import metier; metier.check"]


@pytest.mark.parametrize("first", IMPORTS)
def test_compare_is_callable_whatever_was_imported_before(first):
    code = f"{first}; import metier; assert callable(metier.compare); from metier import compare; assert callable(compare)"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- parts in loops that are not ours ---------------------------------------------------------------------------


def test_an_optimizer_in_a_plain_loop():
    """Lion written out in float64: sign of the mixed momentum, decoupled decay."""
    torch.manual_seed(0)
    x, y = torch.randn(16, 3), torch.randn(16, 1)
    layer = torch.nn.Linear(3, 1)
    w, b = layer.weight.detach().double().clone(), layer.bias.detach().double().clone()
    m = [torch.zeros_like(w), torch.zeros_like(b)]
    optimizer = metier.optimizers.Lion(layer.parameters(), lr=0.01, weight_decay=0.1, beta1=0.8)
    assert isinstance(optimizer, torch.optim.Optimizer)
    for _ in range(4):
        optimizer.zero_grad()
        (layer(x) - y).square().mean().backward()
        optimizer.step()
        error = x.double() @ w.T + b - y.double()
        grads = [2 * error.T @ x.double() / 16, 2 * error.mean(0)]
        for i, (p, g) in enumerate(zip((w, b), grads, strict=True)):
            p.mul_(1 - 0.01 * 0.1).sub_(0.01 * torch.sign(0.8 * m[i] + 0.2 * g))
            m[i] = 0.99 * m[i] + 0.01 * g
    torch.testing.assert_close(layer.weight.double(), w, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer.bias.double(), b, rtol=1e-5, atol=1e-6)


def test_an_optimizer_refuses_what_it_does_not_know():
    with pytest.raises(UsageError, match="beta1"):
        metier.optimizers.Lion([torch.nn.Parameter(torch.ones(2))], betta1=0.9)


# --- attributes -----------------------------------------------------------------------------------------------


def test_everything_listed_is_there():
    for name in dir(metier):
        assert getattr(metier, name) is not None
    assert set(metier.__all__) == set(dir(metier))
    assert {"train", "compare", "check", "build", "optimizers", "objectives", "schedules", "testing"} <= set(dir(metier))
    assert all(callable(getattr(metier, f)) for f in ("train", "compare", "check", "build"))


def test_namespaces_hold_the_parts_of_their_kind():
    from metier.core import part

    assert {i.object for i in part.listing() if i.kind == "optimizer"} == set(dir(metier.optimizers))
    assert metier.hooks.EMA is part.load("hook/ema")
    assert metier.build("optimizer", {"lion": {"beta1": 0.5}}).obj.beta1 == 0.5


@pytest.mark.parametrize(
    ("where", "name"), [("metier", "optimisers"), ("metier.optimizers", "Loin"), ("metier.objectives", "nothing")]
)
def test_an_attribute_that_is_not_there(where, name):
    import importlib

    module = importlib.import_module(where)
    with pytest.raises(AttributeError, match=name):
        getattr(module, name)
    assert not hasattr(module, name)


def test_importing_costs_nothing():
    code = "import sys, metier; dir(metier); metier.optimizers; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
