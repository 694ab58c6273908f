"""Two gloo processes on the CPU give the trajectory of one, under DDP and FSDP2, and continue each other's checkpoints."""

import json

import pytest
import torch
from processes import launched
from safetensors.torch import load_file

RUN = """
model: lab/llama-50k
data: {train: lab/pydoc, limit: 12, chunk: true, max_length: 32, eval_fraction: 0.2, eval_limit: 8}
optimizer: {adamw: {lr: 1e-2}}
schedule: constant
train: {steps: 6, batch: 8, micro_batch: 2, save_every: 3, keep: 5}
"""
TOLERANCE = 1e-5


def train(tmp_path, name, *overrides, world=1):
    done = launched(["-m", "metier", "train", tmp_path / "run.yaml", *overrides, "-q", "-o", tmp_path / name], world)
    assert done.returncode == 0, done.stderr[-3000:]
    return tmp_path / name


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    (folder / "run.yaml").write_text(RUN)
    train(folder, "one")
    return folder


def weights(folder, kind="model"):
    (path,) = (folder / kind).glob("*.safetensors")
    return load_file(path)


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=TOLERANCE)


def losses(folder):
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [e["loss"] for e in events if e["event"] == "step"] + [e["eval_loss"] for e in events if e["event"] == "eval"]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_give_the_trajectory_of_one(alone, strategy):
    two = train(alone, f"two-{strategy}", f"train.strategy={strategy}", world=2)
    assert_same(weights(two), weights(alone / "one"))
    assert losses(two) == pytest.approx(losses(alone / "one"), abs=TOLERANCE)


@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2)])
def test_a_sharded_checkpoint_is_continued_at_another_world_size(alone, first, then):
    name = f"from-{first}-to-{then}"
    train(alone, name, "train.strategy=fsdp", "train.max_seconds=1e-9", world=first)
    steps = len(losses(alone / name))
    assert steps < 6
    train(alone, name, "train.strategy=fsdp", "train.steps=3", world=first)
    train(alone, name, "train.strategy=fsdp", world=then)
    assert_same(weights(alone / name), weights(alone / "one"))


def test_an_adapter_and_its_average_are_gathered_and_saved(alone):
    one = train(alone, "lora-one", "adapter=lora", "hooks=[ema]", "optimizer.lr=1e-3")
    two = train(alone, "lora-two", "adapter=lora", "hooks=[ema]", "optimizer.lr=1e-3", "train.strategy=fsdp", world=2)
    assert_same(weights(two, "adapter"), weights(one, "adapter"))


def test_compressed_gradients_give_the_trajectory_of_one(alone):
    """Each process keeps its own gradient of the matrices; only small factors are exchanged."""
    dion = ["optimizer={dion: {rank_fraction: 0.5, lr: 0.01, compressed: true}}", "train.clip=null"]
    one = train(alone, "dion-one", *dion)
    two = train(alone, "dion-two", *dion, world=2)
    assert_same(weights(two), weights(one))
    train(alone, "dion-resumed", *dion, "train.steps=3", world=2)
    assert_same(weights(train(alone, "dion-resumed", *dion, world=2)), weights(one))
