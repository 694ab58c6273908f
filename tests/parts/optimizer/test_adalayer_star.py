"""Oracle of optimizer/adalayer-star: which layer every parameter of a model belongs to, and Adalayer for each."""

import numpy as np
import pytest
import torch
from torch import nn

from metier.core import part
from metier.core.optim import build


class Model(nn.Module):
    """An embedding table, a hidden layer, a gain, and an output layer of its own or tied."""

    def __init__(self, vocabulary=7, tied=False):
        super().__init__()
        self.table, self.hidden = nn.Embedding(vocabulary, 4), nn.Linear(4, 4, bias=False)
        self.norm, self.out = nn.LayerNorm(4, bias=False), nn.Linear(4, vocabulary, bias=False)
        if tied:
            self.out.weight = self.table.weight
        self.double()

    def get_output_embeddings(self):
        return self.out


def moved(model, ref, steps=8, seed=0, **options):
    """Positions of the parameters after ``steps`` on gradients whose rows differ by orders of magnitude."""
    rng = np.random.default_rng(seed)
    optimizer = build(model, part.build("optimizer", ref), lr=0.03, weight_decay=0.1)
    grads = {n: [rng.normal(size=p.shape) * 10.0 ** -np.arange(len(p)).reshape(-1, *[1] * (p.ndim - 1)) for _ in range(steps)]
             for n, p in model.named_parameters()}  # fmt: skip
    for t in range(steps):
        for name, p in model.named_parameters():
            p.grad = torch.tensor(grads[name][t])
        optimizer.step()
    return {n: p.detach().numpy().copy() for n, p in model.named_parameters()}, grads, optimizer


def formula(start, grads, axis, lr=0.03, wd=0.1, b1=0.9, b2=0.95, eps=1e-8):
    p, m, v = start.copy(), 0.0, 0.0
    for t, g in enumerate(grads, start=1):
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * np.mean(g**2, axis=axis, keepdims=True)
        p = p * (1 - lr * wd) - lr * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
    return p


@pytest.mark.parametrize("tied", [False, True])
def test_formula_of_every_role(tied):
    model = Model(tied=tied)
    start = {n: p.detach().numpy().copy() for n, p in model.named_parameters()}
    got, grads, _ = moved(model, {"adalayer-star": {"tied": tied}})
    split = {"table.weight"} if tied else {"out.weight"}
    assert set(got) == {"table.weight", "hidden.weight", "norm.weight"} | split
    for name in got:
        wanted = formula(start[name], grads[name], 1 if name in split else None, wd=0.0 if name == "norm.weight" else 0.1)
        np.testing.assert_allclose(got[name], wanted, rtol=1e-10, err_msg=name)


def test_with_a_head_of_one_row_it_is_adalayer():
    one, other = Model(vocabulary=1), Model(vocabulary=1)
    other.load_state_dict(one.state_dict())
    star, plain = moved(one, "adalayer-star")[0], moved(other, "adalayer")[0]
    for name in star:
        np.testing.assert_array_equal(star[name], plain[name])


def test_with_more_rows_only_the_head_differs():
    one, other = Model(), Model()
    other.load_state_dict(one.state_dict())
    star, plain = moved(one, "adalayer-star")[0], moved(other, "adalayer")[0]
    assert [n for n in star if not np.array_equal(star[n], plain[n])] == ["out.weight"]


def test_a_tied_table_counts_as_embeddings_unless_told():
    one, other = Model(tied=True), Model(tied=True)
    other.load_state_dict(one.state_dict())
    star, plain = moved(one, "adalayer-star")[0], moved(other, "adalayer")[0]
    assert all(np.array_equal(star[n], plain[n]) for n in star)


def test_state_is_one_number_per_tensor_and_one_per_row_of_the_head():
    model = Model()
    sizes = {n: s["v"].numel() for n, s in moved(model, "adalayer-star")[2].full_state_dict().items()}
    assert sizes == {"table.weight": 1, "hidden.weight": 1, "norm.weight": 1, "out.weight": 7}


def test_all_roles_share_the_learning_rate_and_the_options():
    groups = moved(Model(), {"adalayer-star": {"beta1": 0.5}})[2].param_groups
    assert {g["lr"] for g in groups} == {0.03}
    rule = part.build("optimizer", {"adalayer-star": {"beta1": 0.5}}).obj
    assert rule.for_role("head").beta1 == 0.5
