"""Losses of a whole step put together from micro-batches and processes, against autograd on all scores at once.

The losses here mix everything that they see, so that a slope at another place is another number. Bugs it is meant to catch:
tokens of two micro-batches under one number, slopes handed to the wrong rows, lists of unequal width, a process that takes the slopes
of another, margins that some micro-batches lack.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from metier.core.batch import Lists, Pairs, Tokens
from metier.core.wholebatch import carried, join, nothing, policy, whole, whole_value


def drawn(rng, *shape):
    return torch.tensor(-5 * rng.random(shape))


def pairs(seed, count, margin=True):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 5, 2 * count)
    sequence = torch.tensor(np.repeat(np.arange(2 * count), lengths))
    number = len(sequence)
    tokens = Tokens(drawn(rng, number), torch.ones(number).double(), sequence, drawn(rng, number))
    sums = [torch.zeros(2 * count).double().index_add(0, sequence, t) for t in (tokens.logps, tokens.ref_logps)]
    n = torch.tensor(lengths).double()
    given = drawn(rng, count) if margin else None
    return Pairs(sums[0][0::2], sums[0][1::2], n[0::2], n[1::2], sums[1][0::2], sums[1][1::2], given, tokens=tokens)


def lists(seed, count, width):
    rng = np.random.default_rng(seed)
    present = torch.arange(width) < torch.tensor(rng.integers(2, width + 1, (count, 1)))
    return Lists(drawn(rng, count, width) * present, 3.0 * present, drawn(rng, count, width), present, drawn(rng, count, width))


def of_pairs(b):
    """Every pair with every other, and sums of tokens by their numbers."""
    answers = torch.zeros(2 * len(b.chosen_logps)).double().index_add(0, b.tokens.sequence, b.tokens.logps**2)
    margin = b.chosen_logps - b.rejected_logps
    loss = torch.logsumexp(margin, 0) * b.ref_chosen_logps * margin + answers[0::2] * answers[1::2].sum()
    return loss, {"number": answers.sum(), "each": margin}


def of_lists(b):
    """Every answer with the largest of all lists."""
    return ((b.logps * b.present).sum(1) * b.logps.logsumexp((0, 1)) + (b.logps * b.score * b.present).sum(1)), {}


def joined_by_hand(parts):
    """Pairs only: every field one after the other, sequences counted on."""
    before = np.cumsum([0, *(2 * len(p.chosen_logps) for p in parts)])
    cat = lambda get: torch.cat([get(p) for p in parts])
    sequence = torch.cat([p.tokens.sequence + int(n) for p, n in zip(parts, before, strict=False)])
    tokens = Tokens(cat(lambda p: p.tokens.logps), cat(lambda p: p.tokens.weights), sequence, cat(lambda p: p.tokens.ref_logps))
    names = ("chosen_logps", "rejected_logps", "chosen_len", "rejected_len", "ref_chosen_logps", "ref_rejected_logps", "margin")
    return Pairs(*(cat(lambda p, k=k: getattr(p, k)) for k in names), tokens=tokens)


class Sent(Exception):
    """What a process would send to the others."""


def sent(parts):
    def gather(mine):
        raise Sent(mine)

    with pytest.raises(Sent) as e:
        whole(lambda b: b, parts, gather, 0)
    return e.value.args[0]


def on_ranks(loss, ranks):
    """``whole`` of every process."""
    everything = [sent(parts) for parts in ranks]
    return [whole(loss, parts, lambda _: everything, r) for r, parts in enumerate(ranks)]


def check(loss, ranks, everything):
    """Slopes and sums of all processes are those of the loss of ``everything``, in its order."""
    leaves = {k: v.clone().requires_grad_() for k, v in policy(everything).items()}
    made = replace(everything, **{k: v for k, v in leaves.items() if "." not in k})
    if "tokens.logps" in leaves:
        made = replace(made, tokens=replace(made.tokens, logps=leaves["tokens.logps"]))
    values, metrics = loss(made)
    found = torch.autograd.grad(values.sum(), list(leaves.values()))
    expected = dict(zip(leaves, found, strict=True))
    results = on_ranks(loss, ranks)
    at = dict.fromkeys(expected, 0)
    for parts, result in zip(ranks, results, strict=True):
        assert len(result.slopes) == len(parts)
        assert (result.units, float(result.total)) == (len(values), pytest.approx(float(values.sum().detach()), rel=1e-12))
        for name, value in metrics.items():
            assert float(result.metrics[name]) == pytest.approx(float(value.detach().mean()) * len(values), rel=1e-4)
        for part, slopes in zip(parts, result.slopes, strict=True):
            for name, value in policy(part).items():
                own = expected[name][at[name] : at[name] + len(value)]
                own = own[:, : value.shape[1]] if own.ndim == 2 else own
                torch.testing.assert_close(slopes[name], own, rtol=1e-10, atol=1e-12)
                at[name] += len(value)


@pytest.mark.parametrize("sizes", [[[3]], [[2, 3, 1]], [[2, 1], [4]], [[1], [2, 2], [3]]], ids=str)
def test_pairs_with_tokens(sizes):
    ranks = [[pairs(10 * r + i, n) for i, n in enumerate(own)] for r, own in enumerate(sizes)]
    everything = joined_by_hand([p for own in ranks for p in own])
    check(of_pairs, ranks, everything)
    assert join([p for own in ranks for p in own]).tokens.sequence.tolist() == everything.tokens.sequence.tolist()


def test_lists_of_unequal_width():
    ranks = [[lists(1, 2, 3), lists(2, 1, 5)], [lists(3, 3, 2)]]
    rows = [(p, i) for own in ranks for p in own for i in range(len(p.logps))]
    wide = {k: torch.zeros(6, 5).double() for k in ("logps", "length", "score", "ref_logps")} | {"present": torch.zeros(6, 5) > 0}
    for row, (p, i) in enumerate(rows):
        for name, filled in wide.items():
            filled[row, : p.logps.shape[1]] = getattr(p, name)[i]
    check(of_lists, ranks, Lists(**wide))


def test_tokens_of_narrow_lists_keep_their_answer():
    """Two lists of two answers beside one of three: answer ``i K + k`` with the new K."""
    parts = []
    for lengths in ([[2, 1], [1, 3]], [[1, 2, 1]]):
        sequence = torch.arange(sum(map(len, lengths))).repeat_interleave(torch.tensor(lengths).flatten())
        tokens = Tokens(10.0 * (sequence + 1), torch.ones(len(sequence)), sequence)
        sums = torch.zeros(int(sequence[-1]) + 1).index_add(0, sequence, tokens.logps).view(len(lengths), -1)
        parts.append(Lists(sums, torch.tensor(lengths).float(), sums, sums > 0, tokens=tokens))
    b = join(parts)
    assert b.tokens.sequence.tolist() == [0, 0, 1, 3, 4, 4, 4, 6, 7, 7, 8]
    torch.testing.assert_close(torch.zeros(9).index_add(0, b.tokens.sequence, b.tokens.logps).view(3, 3), b.logps)


def test_carried_slopes_give_the_gradient_of_weights():
    """A model of one weight, which every score of every micro-batch depends on."""
    parts = [pairs(1, 2), pairs(2, 3)]

    def scored(p, weight):
        tokens = replace(p.tokens, logps=weight * p.tokens.logps)
        sums = torch.zeros(2 * len(p.chosen_logps)).double().index_add(0, tokens.sequence, tokens.logps)
        return replace(p, tokens=tokens, chosen_logps=sums[0::2], rejected_logps=sums[1::2])

    weight = torch.tensor(1.3).double().requires_grad_()
    (expected,) = torch.autograd.grad(of_pairs(joined_by_hand([scored(p, weight) for p in parts]))[0].sum(), weight)
    slopes = whole(of_pairs, [scored(p, weight) for p in parts], lambda mine: [mine], 0).slopes
    found = [torch.autograd.grad(carried(scored(p, weight), s), weight)[0] for p, s in zip(parts, slopes, strict=True)]
    torch.testing.assert_close(sum(found), expected, rtol=1e-10, atol=0)
    (none,) = torch.autograd.grad(carried(scored(parts[0], weight), nothing(parts[0])), weight)
    assert none == 0


@pytest.mark.parametrize("with_margins", [(True, False), (False, True)])
def test_margins_that_some_micro_batches_lack_are_left_out(with_margins):
    """Such as a mixture of data with scores and data without gives, also to losses that read none."""
    parts = [pairs(i, 2, margin) for i, margin in enumerate(with_margins)]
    assert join(parts).margin is None
    assert whole_value(of_pairs, parts)[1] == 4
