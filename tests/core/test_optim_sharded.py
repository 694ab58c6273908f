"""Two processes, each holding a piece of every tensor (FSDP2), against one process holding all."""

import os
import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn

from metier.core import part
from metier.core.optim import build

pytestmark = pytest.mark.skipif(not dist.is_available() or sys.platform == "win32", reason="needs torch.distributed")
NAMES = ("adamw", "muon", "adafactor")
STEPS = 3


def model():
    """Odd sizes: pieces are of different length, and the last bias has a piece without elements."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(7, 5), nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 1))


def train(module, optimizer, steps, seed):
    for i in range(steps):
        torch.manual_seed(seed + i)
        ids = torch.randint(0, 7, (8,))
        optimizer.zero_grad()
        module(ids).square().mean().backward()
        optimizer.step()


def make(module, name):
    return build(module, part.build("optimizer", name), lr=1e-2, weight_decay=0.1)


def whole(name):
    module = model()
    optimizer = make(module, name)
    train(module, optimizer, STEPS, 0)
    middle = optimizer.full_state_dict()
    train(module, optimizer, STEPS, 100)
    return {n: p.detach() for n, p in module.named_parameters()}, middle, optimizer.state_bytes()


def sharded(name, state=None):
    from torch.distributed.fsdp import fully_shard

    module = model()
    fully_shard(module[1])
    fully_shard(module)
    optimizer = make(module, name)
    train(module, optimizer, STEPS, 0)
    middle = optimizer.full_state_dict()
    fresh = make(module, name)
    fresh.load_full_state_dict(state or middle)
    train(module, fresh, STEPS, 100)
    again = make(module, name)
    again.load_state_dict(fresh.state_dict())
    torch.testing.assert_close(again.full_state_dict(), fresh.full_state_dict())
    return {n: p.full_tensor().detach() for n, p in module.named_parameters()}, middle, fresh.state_bytes()


def process(rank, address):
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{address}", rank=rank, world_size=2)
    try:
        for name in NAMES:
            params, middle, size = whole(name)
            for state in (None, middle):
                got, full, piece = sharded(name, state)
                torch.testing.assert_close(got, params, rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(full, middle, rtol=1e-4, atol=1e-6)
                assert piece < 0.9 * size, f"{name}: each process holds {piece} of {size} bytes"
    finally:
        dist.destroy_process_group()


def test_two_processes_are_one(tmp_path):
    """Elementwise rules on pieces, others on gathered tensors; state saved whole and loaded at the other
    world size.
    """
    torch.multiprocessing.spawn(process, (str(tmp_path / "rendezvous"),), nprocs=2)
