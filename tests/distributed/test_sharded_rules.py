"""Every optimizer moves sharded matrices (FSDP2, two gloo processes) as one process moves whole ones."""

import pytest
import torch
from processes import two
from torch import nn

from metier.core import part
from metier.core.optim import Rule, build

NAMES = [i.name for i in part.listing() if i.kind == "optimizer"]
STEPS = 6


class Tiny(nn.Module):
    """An embedding, odd sizes that do not divide by two, gains, a cube and a scalar."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.wide, self.tall = nn.Linear(6, 9), nn.Linear(9, 5)
        self.norm = nn.LayerNorm(5)
        self.cube = nn.Parameter(torch.randn(3, 2, 5))
        self.lm_head = nn.Linear(5, 7, bias=False)

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, ids):
        x = self.norm(self.tall(self.wide(self.embed(ids)).tanh()))
        return self.lm_head(x + (x @ self.cube.mean((0, 1))).unsqueeze(-1) * self.cube.mean((0, 1)))


def model():
    torch.manual_seed(3)
    return Tiny()


def trajectory(net, optimizer):
    """Train on batches that depend on the step alone; every process sees the whole batch."""
    for t in range(STEPS):
        ids = torch.randint(0, 7, (4, 8), generator=torch.Generator().manual_seed(t))
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(ids).flatten(0, 1), ids.roll(-1, 1).flatten())
        loss.backward()
        optimizer.observe(loss=float(loss.detach()), progress=t / STEPS)
        optimizer.step()


def optimizer_of(net, built):
    optimizer = build(net, built, weight_decay=0.1)
    # A function of the weights stands for the gradient on sampled labels.
    optimizer.sampler = lambda: (4, {id(p): p.detach().sin() for p in net.parameters()})
    return optimizer


def gap(built, fully_shard):
    """Largest difference between the trajectories of whole and of sharded parameters."""
    whole, pieces = model(), model()
    trajectory(whole, optimizer_of(whole, built))
    fully_shard(pieces)
    trajectory(pieces, optimizer_of(pieces, built))
    pairs = zip(pieces.parameters(), whole.parameters(), strict=True)
    return max(float((p.full_tensor() - q).abs().max()) for p, q in pairs)


def gaps_of(rank, names):
    from torch.distributed.fsdp import fully_shard

    found = {}
    for name in names:
        try:
            found[name] = gap(part.build("optimizer", name), fully_shard)
        except Exception as e:  # the same on both processes; the others shall still be tested
            found[name] = repr(e)
    return found


@pytest.fixture(scope="module")
def gaps(tmp_path_factory):
    names = [n for n in NAMES if not hasattr(part.load(n, "optimizer"), "step")]
    return two(tmp_path_factory.mktemp("sharded"), gaps_of, names)[0]


@pytest.mark.parametrize("name", NAMES)
def test_sharded_matrices_move_like_whole_ones(gaps, name):
    if hasattr(part.load(name, "optimizer"), "step"):
        pytest.skip("evaluates the loss itself; tested with its part")
    assert issubclass(part.load(name, "optimizer"), Rule)
    assert isinstance(gaps[name], float), gaps[name]
    assert gaps[name] < 1e-5
