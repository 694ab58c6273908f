"""Oracle of objective/combined: the sum written out from the parts, rpo, and what is refused.

Bugs it is meant to catch: weights on the wrong part, metrics of one part over another's, needs of the last part only.
"""

import json

import numpy as np
import pytest
import torch
from _referenced import build, random_pairs, slopes, value

from metier.core import models, part
from metier.core.batch import Pairs
from metier.core.data.collate import collate
from metier.core.data.encode import Item
from metier.core.errors import UsageError
from metier.core.lossmodule import LossModule
from metier.core.scores import reference_scorer
from metier.parts.objective._nested import Outer
from metier.testing import check_part


def test_contract():
    check_part("objective/combined")


def test_weighted_sum_and_gradient():
    b, losses, weights = random_pairs(), ["dpo", "bco-pair", "nll"], [0.8, 0.2, 1.0]
    found = value("combined", b, losses=losses, weights=weights)
    np.testing.assert_allclose(found, sum(w * value(n, b) for w, n in zip(weights, losses, strict=True)), rtol=1e-12)
    parts = [slopes(n, b) for n in losses]
    for side, g in enumerate(slopes("combined", b, losses=losses, weights=weights)):
        np.testing.assert_allclose(g, sum(w * p[side] for w, p in zip(weights, parts, strict=True)), rtol=1e-12)


def test_weights_are_one_by_default():
    b = random_pairs()
    np.testing.assert_allclose(value("combined", b, losses=["dpo", "nll"]), value("rpo", b), rtol=1e-12)


def test_metrics_carry_the_names_of_their_parts():
    metrics = build("combined", losses=["dpo", {"dpo": {"beta": 1.0}}, "nll"])(random_pairs())[1]
    assert {"dpo/margin", "dpo-2/margin", "nll/margin", "dpo/loss", "dpo-2/loss", "nll/loss"} <= set(metrics)
    torch.testing.assert_close(metrics["dpo-2/margin"], 10 * metrics["dpo/margin"])
    assert not any("/" not in k for k in metrics)


def test_needs_are_those_of_all_parts():
    assert build("combined", losses=["nll", "dpo"]).needs == {"reference"}
    assert build("combined", losses=["dpo", "nll"]).needs == {"reference"}
    assert build("combined", losses=["nll"]).needs == frozenset()
    assert build("combined", losses=["nll"]).reads is Pairs


class Counting:
    """A loss with a state, as the core calls it."""

    def __init__(self):
        self.count, self.progress = 0, 0.0

    def observe(self, b):
        self.count += 1

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


def test_examples_are_those_that_all_parts_read():
    assert part.build("objective", {"combined": {"losses": ["pl-dpo", "sami"]}}).takes == part.load("sami", "objective").takes
    assert part.build("objective", {"length-normalized": {"of": "sami"}}).takes == part.load("sami", "objective").takes
    assert part.build("objective", {"combined": {"losses": ["dpo", "nll"]}}).takes is None


def test_the_state_of_parts_is_kept():
    made, again = (build("combined", losses=["dpo", "nll"]) for _ in range(2))
    for o in (made, again):
        o.parts["nll"].obj = Counting()
    made.observe(random_pairs())
    made.observe(random_pairs())
    made.progress = 0.25
    again.load_state_dict(json.loads(json.dumps(made.state_dict())))
    assert again.parts["nll"].obj.count == 2
    assert made.parts["nll"].obj.progress == made.progress == 0.25
    assert isinstance(made, Outer)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"losses": []}, "at least one loss"),
        ({"losses": ["dpo", "nll"], "weights": [1.0]}, "2 losses but 1 weights"),
        ({"losses": ["dpo"], "weights": [0.0]}, "at least one loss"),
        ({"losses": ["dpo", "nll"], "weights": [1.0, -1.0]}, "weights"),
        ({"losses": ["dpo", "lm"]}, "objective/dpo reads Pairs; objective/lm reads Tokens"),
        (
            {"losses": ["dpo", {"nll": {"reducton": "sum"}}]},
            r"objective/combined, losses\[1\] nll, option reducton[^$]*'reduction'",
        ),
        ({"losses": ["dpo", "r3f"]}, r"losses\[1\] r3f: objective/r3f scores the model by itself"),
    ],
)
def test_errors_name_the_place(options, said):
    with pytest.raises(UsageError, match=said):
        build("combined", **options)


def test_on_a_model():
    """Scores of a model and a reference, once for both: the sum of what the parts give alone, gradients included."""
    policy, frozen = (models.load("lab/llama-50k", seed=s).model.double() for s in (1, 2))
    prompt, better, worse = np.array([5, 6]), np.array([7, 8, 9]), np.array([10])
    item = Item(prompt, np.zeros(2, bool), (better, worse), (np.ones(3, bool), np.ones(1, bool)), "x")
    found = []
    for ref in ("dpo", "nll", {"combined": {"losses": ["dpo", "nll"], "weights": [2.0, 0.5]}}):
        policy.zero_grad()
        module = LossModule(policy, part.build("objective", ref), reference_scorer(frozen, torch.no_grad))
        total, units, _ = module(collate([item], pad_id=3))
        total.backward()
        found.append((units, total.item(), torch.cat([p.grad.flatten() for p in policy.parameters()])))
    (_, dpo, g_dpo), (_, nll, g_nll), (units, both, g_both) = found
    assert units == 1
    assert both == pytest.approx(2 * dpo + 0.5 * nll, rel=1e-9)
    torch.testing.assert_close(g_both, 2 * g_dpo + 0.5 * g_nll)
