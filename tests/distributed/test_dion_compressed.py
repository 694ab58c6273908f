"""optimizer/dion averaging small matrices only: two gloo processes with a gradient each, against one with their mean."""

import pytest
import torch
from processes import two

from metier.core import part
from metier.core.optim import Optimizer

SHAPES = {"tall": (24, 10), "wide": (10, 24), "square": (12, 12)}
STEPS = 12
FRACTIONS = (0.25, 1.0)


def gradients(t):
    """For each of two processes, one gradient a parameter."""
    source = torch.Generator().manual_seed(t)
    return [{n: torch.randn(s, generator=source, dtype=torch.float64) for n, s in SHAPES.items()} for _ in range(2)]


def trained(pick, **options):
    """Parameters and optimizer after some steps on ``pick`` of the gradients of both."""
    params = {n: torch.nn.Parameter(torch.ones(s, dtype=torch.float64)) for n, s in SHAPES.items()}
    optimizer = Optimizer(list(params.items()), part.build("optimizer", {"dion": options}).obj, lr=0.01, weight_decay=0.1)
    for t in range(STEPS):
        for name, g in pick(gradients(t)).items():
            params[name].grad = g
        optimizer.step()
    return {n: p.detach() for n, p in params.items()}, optimizer


def mean(both):
    return {n: (both[0][n] + both[1][n]) / 2 for n in SHAPES}


def of_all_fractions(rank):
    return [compressed(rank, rank_fraction=fraction) for fraction in FRACTIONS]


def compressed(rank, **options):
    """Weights, own states, settled states, and how many numbers were sent in the steps."""
    sent = []
    reduce = torch.distributed.all_reduce
    torch.distributed.all_reduce = lambda x, *args, **named: sent.append(x.numel()) or reduce(x, *args, **named)
    params, optimizer = trained(lambda both: both[rank], compressed=True, **options)
    torch.distributed.all_reduce = reduce
    states = {n: {k: v.clone() for k, v in optimizer.state[p].items() if k in ("m", "q")} for n, p in optimizer.named()}
    settled = optimizer.full_state_dict()  # settles: what is saved must not be one process's own
    kept = ({n: {k: s[n][k].tolist() for k in ("m", "q")} for n in SHAPES} for s in (states, settled))
    return [{n: p.tolist() for n, p in params.items()}, *kept, sum(sent)]


@pytest.fixture(scope="module")
def replicas(tmp_path_factory):
    return two(tmp_path_factory.mktemp("replicas"), of_all_fractions)


@pytest.fixture(params=range(len(FRACTIONS)), ids=["rank 1/4", "full rank"])
def both(request, replicas):
    return {"rank_fraction": FRACTIONS[request.param]}, [results[request.param] for results in replicas]


def test_weights_are_those_of_one_process_with_the_mean_gradient(both):
    options, results = both
    params, optimizer = trained(mean, **options)
    alone = optimizer.full_state_dict()
    for name in SHAPES:
        for rank in (0, 1):
            found, local, settled, _ = results[rank]
            torch.testing.assert_close(torch.tensor(found[name], dtype=torch.float64), params[name], rtol=0, atol=1e-9)
            for state in (local, settled):
                torch.testing.assert_close(
                    torch.tensor(state[name]["q"], dtype=torch.float64), alone[name]["q"], rtol=0, atol=1e-9
                )
            torch.testing.assert_close(torch.tensor(settled[name]["m"], dtype=torch.float64), alone[name]["m"], rtol=0, atol=1e-9)
        apart = torch.tensor(results[0][1][name]["m"]) - torch.tensor(results[1][1][name]["m"])
        assert (apart.abs().max() > 1) == (options["rank_fraction"] < 1)
        assert results[0][0][name] == results[1][0][name], "replicas must not drift apart by a bit"


def test_only_small_matrices_are_sent(both):
    """(m + n) r numbers a matrix and step below full rank, the whole gradient otherwise."""
    options, results = both
    ranks = {n: part.build("optimizer", {"dion": options}).obj.rank(*s) for n, s in SHAPES.items()}
    full = options["rank_fraction"] == 1
    wanted = STEPS * sum(s[0] * s[1] if full else sum(s) * ranks[n] for n, s in SHAPES.items())
    assert results[0][3] == wanted


def test_alone_the_option_does_nothing():
    one, _ = trained(mean, rank_fraction=0.25)
    other, _ = trained(mean, rank_fraction=0.25, compressed=True)
    torch.testing.assert_close(one, other, rtol=0, atol=0)
