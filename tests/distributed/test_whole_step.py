"""Losses of a whole step: two processes find the slopes that one finds on all parts, for lists of different widths with tokens.

Bugs it is meant to catch: parts in another order, slopes of another process's parts, padding that counts, answers of tokens that
are numbered anew in the wrong place.
"""

import torch
from processes import two

from metier.core.batch import Lists, Tokens
from metier.core.engine import Engine
from metier.core.wholebatch import whole

SHAPES = ((2, 3), (1, 5), (3, 2), (2, 4))
"""Lists and answers of each part: the first two are the first process's."""


def parts(seed=0):
    source, found = torch.Generator().manual_seed(seed), []
    for b, k in SHAPES:
        present = torch.arange(k) < torch.randint(2, k + 1, (b, 1), generator=source)
        sequence = present.flatten().nonzero()[:, 0].repeat_interleave(2)
        logps = torch.randn(len(sequence), generator=source)
        summed = torch.zeros(b * k).index_add(0, sequence, logps).view(b, k)
        tokens = Tokens(logps, torch.ones(len(sequence)), sequence)
        found.append(Lists(summed, 2.0 * present, torch.rand(b, k, generator=source) * present, present, tokens=tokens))
    return found


def loss(batch):
    """Of all answers and all tokens: a token's square counts by what its answer's score is among all lists."""
    score = torch.where(batch.present, batch.score + batch.logps.tanh(), -torch.inf).flatten().softmax(0)
    each = score[batch.tokens.sequence] * batch.tokens.logps**2
    total = each.sum() + (batch.logps * batch.score).sum().exp().log1p()
    return total.expand(len(batch.logps)), {"answers": batch.present.sum(1).float()}


def numbers(found):
    metrics = {k: float(v) for k, v in found.metrics.items()}
    return [float(found.total), found.units, metrics, [{k: v.tolist() for k, v in s.items()} for s in found.slopes]]


def on(rank):
    engine = Engine(torch.device("cpu"), "fp32", "ddp", rank, 2)
    return numbers(whole(loss, parts()[2 * rank : 2 * rank + 2], engine.gather, rank))


def test_slopes_are_those_of_one_process(tmp_path):
    *values, slopes = numbers(whole(loss, parts(), lambda mine: [mine], 0))
    assert values[1] == sum(b for b, _ in SHAPES)
    leaves = [p.logps.clone().requires_grad_() for p in parts()]
    direct = torch.autograd.grad(scattered(leaves), leaves)
    for slope, expected in zip(slopes, direct, strict=True):
        torch.testing.assert_close(torch.tensor(slope["logps"]), expected)
    first, second = two(tmp_path, on)
    assert first[:3] == second[:3] == values
    assert first[3] + second[3] == slopes


def scattered(leaves):
    """The same loss written over the parts, without joining them; times the units, as it is given to each."""
    whole_parts = parts()
    flat = torch.cat([(p.score + x.tanh())[p.present] for p, x in zip(whole_parts, leaves, strict=True)]).softmax(0)
    squares = torch.cat([(p.tokens.logps**2).view(-1, 2).sum(1) for p in whole_parts])
    linear = torch.stack([(x * p.score).sum() for p, x in zip(whole_parts, leaves, strict=True)]).sum()
    return ((flat * squares).sum() + linear.exp().log1p()) * sum(b for b, _ in SHAPES)
