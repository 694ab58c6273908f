"""Tokens of lists: numbered by list and answer, also where lists are ragged, and when micro-batches are joined."""

import numpy as np
import torch

from metier.core import models
from metier.core.batch import Lists
from metier.core.data.collate import collate
from metier.core.data.encode import Item
from metier.core.scores import score
from metier.core.wholebatch import join

ANSWERS = ([[7, 8, 9], [10]], [[14], [15, 16], [17, 18]], [[3, 4], [5, 6, 7]])


def scored(which):
    items = [
        Item(np.array([5, 6]), np.zeros(2, bool), tuple(map(np.array, a)), tuple(np.ones(len(x), bool) for x in a), "x",
             label=tuple(range(len(a))))
        for a in which
    ]  # fmt: skip
    model = models.load("lab/llama-50k", seed=1).model.eval()
    return score(model, collate(items, pad_id=3), Lists, needs=frozenset({"tokens"}))


def summed(b):
    flat = b.tokens.logps.new_zeros(b.logps.numel()).index_add(0, b.tokens.sequence, b.tokens.logps)
    return flat.view_as(b.logps)


def test_sums_of_the_tokens_are_the_lists():
    b = scored(ANSWERS)
    torch.testing.assert_close(summed(b), b.logps)
    assert torch.bincount(b.tokens.sequence, minlength=9).view(3, 3).tolist() == [[3, 1, 0], [1, 2, 2], [2, 3, 0]]
    assert scored(ANSWERS[:1]).tokens is not None


def test_joined_micro_batches_of_different_width():
    parts = [scored(ANSWERS[:1]), scored(ANSWERS[1:2]), scored(ANSWERS[2:])]
    whole, joined = scored(ANSWERS), join(parts)
    torch.testing.assert_close(joined.logps, whole.logps)
    assert joined.tokens.sequence.tolist() == whole.tokens.sequence.tolist()
    torch.testing.assert_close(summed(joined), joined.logps)
