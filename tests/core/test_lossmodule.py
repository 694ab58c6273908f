"""Oracle of core/lossmodule and core/aux: sums, units and metrics of a micro-batch, and what modules add to its loss.

Bugs it is meant to catch: metrics of unequal micro-batches averaged equally, NaN where nothing carries loss, a filler that
counts, auxiliary losses of a reference pass or of evaluation kept, next-token losses on a model that sees the next token.
"""

from functools import partial
from itertools import islice

import numpy as np
import pytest
import torch
from torch import nn

from metier.core import aux, models
from metier.core.batch import Labels, Pairs, Tokens
from metier.core.data.collate import collate
from metier.core.data.encode import Item
from metier.core.data.loader import Loader, Shape
from metier.core.errors import UsageError
from metier.core.lossmodule import LossModule, batch_type
from metier.core.part import Built, Card


def nll(b: Tokens):
    return -b.logps, {"per token": b.logps, "one number": torch.tensor(3.0)}


def module(function, model=None, seed=1):
    model = model or models.load("lab/llama-50k", seed=seed).model.double()
    return LossModule(model, Built("objective/test", Card("objective/test", "none"), partial(function), {}))


def item(*tokens, off=0):
    return Item(np.array(tokens, np.int32), np.arange(len(tokens)) >= off, id="x")


ITEMS = [item(*range(5, 5 + n)) for n in (4, 9, 2, 7, 3)]


def test_sums_of_micro_batches_add_up():
    m = module(nll)
    total, units, metrics = m(collate(ITEMS, pad_id=3))
    parts = [m(collate(part, pad_id=3)) for part in (ITEMS[:1], ITEMS[1:2], ITEMS[2:])]
    assert units == sum(p[1] for p in parts) == 20
    torch.testing.assert_close(total, sum(p[0] for p in parts))
    for name in metrics:
        torch.testing.assert_close(metrics[name], sum(p[2][name] for p in parts))
    assert metrics["per token"].item() == pytest.approx(-total.item(), rel=1e-6)
    assert metrics["one number"].item() == 60
    assert not any(v.requires_grad for v in metrics.values())


def test_nothing_with_loss_adds_nothing():
    m = module(nll)
    total, units, metrics = m(collate([item(5, 6, off=2)], pad_id=3))
    assert (total.item(), units) == (0.0, 0)
    assert {k: v.item() for k, v in metrics.items()} == {"per token": 0.0, "one number": 0.0}
    total.backward()
    assert all(p.grad is None or not p.grad.any() for p in m.parameters())


@pytest.mark.parametrize("world", [2, 3, 4])
def test_processes_together_do_what_one_does(world):
    """Gradients, units and metrics summed over the processes, in a step whose examples cannot be dealt evenly."""

    def total(rank, world):
        m = module(nll)
        shape = Shape(3, 64, 1)
        loader = Loader(ITEMS, None, shape, fingerprint={}, seed=0, batch=5, rank=rank, world=world)
        (step,) = islice(loader, 1)
        sums = {}
        for layout in step.micro:
            loss, units, metrics = m(layout)
            (loss / step.units).backward()
            for name, value in {"loss": loss.detach(), "units": units, **metrics}.items():
                sums[name] = sums.get(name, 0) + float(value)
        return sums, {n: p.grad for n, p in m.named_parameters()}

    alone, grads = total(0, 1)
    parts = [total(r, world) for r in range(world)]
    assert {k: sum(p[0][k] for p in parts) for k in alone} == pytest.approx(alone)
    for name, g in grads.items():
        torch.testing.assert_close(sum(p[1][name] for p in parts), g, rtol=0, atol=1e-6)


class Balance(nn.Module):
    """A norm that adds to the loss, twice with weight, and looks at the rows it computes."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.scale, self.seen = inner, nn.Parameter(torch.ones((), dtype=torch.float64)), []

    def forward(self, x):
        self.seen.append(aux.layout())
        aux.add("balance", self.scale * 2, weight=0.5)
        aux.add("balance", self.scale**2)
        return self.inner(x)


def balanced():
    model = models.load("lab/llama-50k", seed=1).model.double()
    model.model.norm = Balance(model.model.norm)
    return model, model.model.norm


def test_what_modules_add_is_averaged_over_units():
    model, balance = balanced()
    plain = module(nll)(collate(ITEMS, pad_id=3))[0]
    total, units, metrics = module(nll, model)(collate(ITEMS, pad_id=3))
    assert (total - plain).item() == pytest.approx(2 * units)
    assert metrics["balance"].item() == 2 * units
    (total / units).backward()
    assert balance.scale.grad.item() == pytest.approx(1 + 2)
    model.eval()
    assert model(input_ids=torch.tensor([[5, 6]])).logits.shape[1] == 2  # elsewhere the calls do nothing
    assert balance.seen[-1] is None


def test_rows_are_known_in_a_checkpointed_block_too():
    """Such a block is computed again during backward, when the forward pass is over."""
    model = models.load("lab/llama-50k", seed=1).model.double()
    block = model.model.layers[0]
    block.mlp = Balance(block.mlp)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    m = module(nll, model)
    for rows in (collate(ITEMS[:2], pad_id=3), collate(ITEMS[2:], pad_id=3)):
        block.mlp.seen.clear()
        total, units, _ = m(rows)
        (total / units).backward()
        assert [x is rows for x in block.mlp.seen] == [True, True]
    assert aux.layout() is None
    assert block.mlp.scale.grad.item() == pytest.approx(6)


def test_next_token_losses_need_a_causal_model():
    bert = models.load("lab/bert-1m", seed=1).model
    with pytest.raises(UsageError, match="objective/test predicts each token from those before it, but bert sees them all"):
        module(nll, bert)

    def loss(b: Labels):
        return b.logits[:, 0]

    assert module(loss, models.load("lab/bert-1m", task="classify").model).reads is Labels


def test_batch_type():
    def pairs(b: Pairs, *, beta: float = 1.0):
        return b.chosen_logps

    def nothing(b, *, beta: float = 1.0):
        return b

    class Rare:
        reads = Tokens

    assert batch_type(partial(pairs, beta=2.0)) is Pairs
    assert batch_type(Rare()) is Tokens
    with pytest.raises(TypeError, match="nothing"):
        batch_type(partial(nothing))
