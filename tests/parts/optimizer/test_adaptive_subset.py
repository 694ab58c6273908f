"""Oracle of optimizer/adaptive-subset: every role moves exactly as under the whole-model optimizer it is given to."""

import numpy as np
import pytest
import torch
from torch import nn

from metier.core import part
from metier.core.errors import UsageError
from metier.core.optim import build, default_lr

SUBSETS = {"both": {"out.weight", "norm.weight", "norm.bias"}, "head": {"out.weight"}, "norms": {"norm.weight", "norm.bias"}}


class Model(nn.Module):
    """An embedding table, a hidden layer, a norm, and an output layer of its own or tied."""

    def __init__(self, tied=False):
        super().__init__()
        self.table, self.hidden = nn.Embedding(7, 4), nn.Linear(4, 4, bias=False)
        self.norm, self.out = nn.LayerNorm(4), nn.Linear(4, 7, bias=False)
        if tied:
            self.out.weight = self.table.weight
        generator = torch.Generator().manual_seed(5)
        for p in self.parameters():
            nn.init.normal_(p, generator=generator)
        self.double()

    def get_output_embeddings(self):
        return self.out


def moved(ref, *, lr, tied=False, steps=8):
    """Positions of the parameters after ``steps`` on given gradients."""
    rng = np.random.default_rng(0)
    model = Model(tied)
    optimizer = build(model, part.build("optimizer", ref), lr=lr, weight_decay=0.1)
    for t in range(steps):
        for p in model.parameters():
            p.grad = torch.tensor(rng.normal(size=p.shape) * 0.7**t)
        optimizer.step()
    return {n: p.detach().numpy().copy() for n, p in model.named_parameters()}, optimizer


@pytest.mark.parametrize("adaptive", ["adamw", "adafactor", "adalayer-star"])
@pytest.mark.parametrize("on", ["both", "head", "norms"])
def test_every_role_moves_as_under_its_rule_alone(adaptive, on):
    got, _ = moved({"adaptive-subset": {"adaptive": adaptive, "on": on, "beta": 0.8, "beta2": 0.97, "ratio": 50.0}}, lr=0.5)
    chosen, _ = moved({adaptive: {"beta2": 0.97}}, lr=0.5 / 50)
    trunk, _ = moved({"sgd-momentum": {"beta": 0.8}}, lr=0.5)
    for name, value in got.items():
        wanted = chosen if name in SUBSETS[on] else trunk
        np.testing.assert_allclose(value, wanted[name], rtol=1e-12, err_msg=name)
        assert not np.allclose(chosen[name], trunk[name], rtol=1e-3), "the two rules cannot be told apart"


@pytest.mark.parametrize("adaptive", ["adamw", "adalayer-star"])
def test_a_tied_table_is_the_head_when_told(adaptive):
    def where(**options):
        ref = {"adaptive-subset": {"adaptive": adaptive, "on": "head", "ratio": 50.0, **options}}
        return moved(ref, lr=0.5, tied=True)[0]["table.weight"]

    rule = part.build("optimizer", {adaptive: {"beta2": 0.95}}).obj
    alone = {adaptive: {"beta2": 0.95, **({"tied": True} if adaptive == "adalayer-star" else {})}}
    np.testing.assert_allclose(where(tied=True), moved(alone, lr=0.01, tied=True)[0]["table.weight"], rtol=1e-12)
    np.testing.assert_allclose(where(), moved("sgd-momentum", lr=0.5, tied=True)[0]["table.weight"], rtol=1e-12)
    assert rule.default_lr == 3e-4


def test_the_ratio_of_the_learning_rates():
    def rates(**options):
        groups = moved({"adaptive-subset": options}, lr=0.2)[1].param_groups
        return {g["role"]: g["lr"] for g in groups}

    assert rates(ratio=100.0) == pytest.approx({"matrices": 0.2, "embeddings": 0.2, "head": 0.002, "rest": 0.002})
    default = rates()
    sgd, adam = (default_lr(part.build("optimizer", n).obj) for n in ("sgd-momentum", "adamw"))
    assert default["matrices"] / default["head"] == pytest.approx(sgd / adam)
    assert 1e2 <= sgd / adam <= 1e4


@pytest.mark.parametrize(("options", "trunk", "head"), [({}, 0.1, 3e-4), ({"ratio": 1000.0}, 0.3, 3e-4)])
def test_default_learning_rates(options, trunk, head):
    optimizer = build(Model(), part.build("optimizer", {"adaptive-subset": options}))
    rates = {g["role"]: g["lr"] for g in optimizer.param_groups}
    assert (rates["matrices"], rates["head"]) == pytest.approx((trunk, head))


def test_state_is_one_tensor_in_the_trunk_and_two_in_the_subset():
    state = moved("adaptive-subset", lr=0.1)[1].full_state_dict()
    assert {n: sorted(set(s) - {"step"}) for n, s in state.items()} == {
        "table.weight": ["m"], "hidden.weight": ["m"], "out.weight": ["m", "v"], "norm.weight": ["m", "v"],
        "norm.bias": ["m", "v"],
    }  # fmt: skip


def test_an_unknown_rule_is_refused():
    with pytest.raises(UsageError, match="adaptive"):
        part.build("optimizer", {"adaptive-subset": {"adaptive": "lion"}})
