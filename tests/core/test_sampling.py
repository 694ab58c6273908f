"""Targets drawn from the model, and the gradient of the loss on them, through the loop."""

from dataclasses import replace

import pytest
import torch

from metier.core import part
from metier.core.data.collate import collate
from metier.core.data.encode import Item
from metier.core.lossmodule import LossModule
from metier.core.models import load
from metier.core.scores import drawn_targets, token_logits

numpy = pytest.importorskip("numpy")


def item(n, seed):
    ids = numpy.random.default_rng(seed).integers(5, 200, n).astype(numpy.int32)
    return Item(ids, numpy.ones(n, bool), id=f"f:{seed}")


def layout(lengths=(9, 6)):
    return collate([item(n, i) for i, n in enumerate(lengths)], pad_id=0)


def test_targets_are_drawn_from_the_softmax():
    """The mean log-probability of draws is the negative entropy, and every draw follows its own position."""
    model = load("lab/llama-50k", seed=0).model.eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(30)  # far from uniform
        rows = layout()
        p = token_logits(model, rows).softmax(-1)
    draw = torch.Generator().manual_seed(0)
    counts = torch.zeros_like(p)
    for _ in range(2000):
        counts[torch.arange(len(p)), drawn_targets(model, rows, draw)] += 1
    error = (counts / 2000 - p).abs()
    assert (error < 5 * (p * (1 - p) / 2000).sqrt() + 2e-3).all()


def test_the_loss_module_scores_the_drawn_tokens():
    model = load("lab/llama-50k", seed=0).model.eval()
    module, rows = LossModule(model, part.build("objective", "lm")), layout()
    drawn = drawn_targets(model, rows, torch.Generator().manual_seed(4))
    assert not torch.equal(drawn, rows.target)
    total, units, _ = module(rows, torch.Generator().manual_seed(4))
    wanted, _, _ = module(replace(rows, target=drawn))
    assert units == len(rows.target)
    torch.testing.assert_close(total, wanted)
    torch.testing.assert_close(module(rows)[0], module(layout())[0])
