"""The tree: exact probabilities, a policy computed leaf by leaf in NumPy, and what an exhibit measures."""

import math

import numpy as np
import pytest
import torch

from metier.lab import treemdp
from metier.lab.treemdp import Tree, exhibit, policy, reference, weights

TREE = Tree()


def test_leaves_are_all_sequences():
    leaves = TREE.leaves
    assert leaves.shape == (27, 3)
    assert len(set(map(tuple, leaves.tolist()))) == 27


def test_probabilities_are_those_of_the_steps():
    w = weights(TREE, 3)
    logp = policy(TREE, w)
    assert float(logp.exp().sum()) == pytest.approx(1, abs=1e-12)
    n = {k: v.numpy() for k, v in w.items()}
    for leaf in (0, 5, 26):
        h, total = n["start"], 0.0
        for a in TREE.leaves[leaf].tolist():
            logits = np.tanh(h) @ n["read"]
            total += logits[a] - math.log(np.exp(logits).sum())
            h = np.tanh(h) @ n["carry"] + n["embed"][a]
        assert float(logp[leaf]) == pytest.approx(total, abs=1e-12)


def test_prefixes_are_shared():
    """Two leaves with the same first actions share their probability: the marginals of the first action sum to one."""
    p = policy(TREE, weights(TREE, 0)).exp()
    first = torch.stack([p[TREE.leaves[:, 0] == a].sum() for a in range(3)])
    w = weights(TREE, 0)
    assert first == pytest.approx((torch.tanh(w["start"]) @ w["read"]).softmax(0), abs=1e-12)


def test_the_reference_has_learnt_the_compared_leaves():
    seen = torch.tensor([0, 7, 13, 20])
    p = policy(TREE, reference(TREE, seen, 0)).exp()
    assert float(p[seen].sum()) == pytest.approx(treemdp.SEEN, abs=0.01)
    assert p[seen] == pytest.approx(treemdp.SEEN / 4, abs=0.02)


def test_an_exhibit_is_reproducible_and_trains():
    one, two = (exhibit({"dpo": {"beta": 0.1}}, seed=1, steps=30) for _ in range(2))
    assert one == two
    assert one["margin"] > 1
    assert one["margin"] == pytest.approx(one["chosen"] - one["rejected"])
    assert one["before"] == pytest.approx(0.1, abs=0.02)
    assert one["peak"] >= max(one["before"], one["after"]) - 1e-12
    assert exhibit({"dpo": {"beta": 0.1}}, seed=2, steps=3) != exhibit({"dpo": {"beta": 0.1}}, seed=1, steps=3)


def test_without_steps_nothing_moves():
    found = exhibit("dpo", steps=0)
    assert found["before"] == found["after"] == found["peak"]
    assert found["margin"] == 0
