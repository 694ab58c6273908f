"""A tree of actions where a preference loss can be watched: does it move probability to answers that nobody compared?

    exhibit({"dpo": {"beta": 0.01}}, pairs=3, seed=0)     -> {"before", "after", "peak", "margin", "chosen", "rejected"}
    tree = Tree(depth=3, actions=3)                       # every sequence of actions ends in a leaf of its own
    policy(tree, weights)                                 # exact log-probabilities of all leaves

States are the actions so far; a step is deterministic and leaves are absorbing, so an answer is a leaf and the probabilities of
all 27 are computed exactly: no sampling. The policy is a small recurrent network, whose weights all states share, as those of a
language model are. The reference has learnt the leaves that are compared, with a little of every other. A loss over pairs of
leaves constrains only differences of their log-probabilities; where the mass goes that they lose, it does not say.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from metier.core import part
from metier.core.batch import Pairs
from metier.core.config import PartRef

WIDTH = 16
SEEN = 0.9
"""Probability of the compared leaves, together, in what the reference learns."""
Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Tree:
    """All sequences of ``depth`` actions."""

    depth: int = 3
    actions: int = 3

    @property
    def leaves(self) -> Tensor:
        """``[actions^depth, depth]`` the actions that lead to each leaf."""
        return torch.tensor(list(product(range(self.actions), repeat=self.depth)))


def weights(tree: Tree, seed: int) -> Weights:
    """Random weights of a policy."""
    rng = torch.Generator().manual_seed(seed)
    shapes = {"embed": (tree.actions, WIDTH), "carry": (WIDTH, WIDTH), "start": (WIDTH,), "read": (WIDTH, tree.actions)}
    return {n: torch.randn(*s, generator=rng, dtype=torch.float64) / WIDTH**0.5 for n, s in shapes.items()}


def policy(tree: Tree, w: Weights) -> Tensor:
    """``[leaves]`` log-probabilities: ``Σ_t log softmax(tanh(h_t) read)``, ``h_{t+1} = tanh(h_t) carry + embed[action]``."""
    leaves = tree.leaves
    state, total = w["start"].expand(len(leaves), -1), torch.zeros(len(leaves), dtype=torch.float64)
    for action in leaves.T:
        seen = torch.tanh(state)
        total = total + (seen @ w["read"]).log_softmax(1).gather(1, action[:, None]).squeeze(1)
        state = seen @ w["carry"] + w["embed"][action]
    return total


def trained(w: Weights, loss: Any, *, steps: int, lr: float) -> tuple[Weights, list[Any]]:
    """Weights after full-batch Adam on ``loss(weights) -> (loss, what to keep)``, and what was kept before each step."""
    own = {n: v.clone().requires_grad_() for n, v in w.items()}
    optimizer = torch.optim.Adam(list(own.values()), lr=lr)
    kept = []
    for _ in range(steps):
        optimizer.zero_grad()
        value, keep = loss(own)
        kept.append(keep)
        value.backward()
        optimizer.step()
    return {n: v.detach() for n, v in own.items()}, kept


def reference(tree: Tree, seen: Tensor, seed: int, *, steps: int = 300) -> Weights:
    """A policy that has learnt to answer with the leaves ``seen`` (probability ``SEEN``, evenly) or any other."""
    target = torch.full((len(tree.leaves),), (1 - SEEN) / (len(tree.leaves) - len(seen)), dtype=torch.float64)
    target[seen] = SEEN / len(seen)
    return trained(weights(tree, seed), lambda w: (-(target * policy(tree, w)).sum(), None), steps=steps, lr=0.03)[0]


def exhibit(
    objective: PartRef, *, pairs: int = 3, seed: int = 0, steps: int = 200, lr: float = 0.01, tree: Tree | None = None
) -> Mapping[str, float]:
    """Train on ``pairs`` disjoint pairs of leaves and measure, exactly, where the probability is.

    ``before`` and ``after``: the summed probability of the leaves that no pair holds, under the reference and under the trained
    policy; ``peak`` its largest value on the way. ``margin``, ``chosen``, ``rejected``: mean log-ratios to the reference at the
    end. ``objective`` is one for pairs.
    """
    tree = tree or Tree()
    order = torch.randperm(len(tree.leaves), generator=torch.Generator().manual_seed(seed + 1000))
    chosen, rejected = order[:pairs], order[pairs : 2 * pairs]
    seen = torch.cat([chosen, rejected])
    base = reference(tree, seen, seed)
    start = policy(tree, base)
    unseen = torch.ones(len(start), dtype=torch.bool).index_fill(0, seen, False)
    built = part.build("objective", objective).obj
    length = torch.full((pairs,), float(tree.depth), dtype=torch.float64)

    def loss(w: Weights) -> tuple[Tensor, float]:
        logp = policy(tree, w)
        result = built(Pairs(logp[chosen], logp[rejected], length, length, start[chosen], start[rejected]))
        value = result[0] if isinstance(result, tuple) else result
        return value.mean(), float(logp.detach().exp()[unseen].sum())

    end, path = trained(base, loss, steps=steps, lr=lr)
    logp = policy(tree, end)
    up, down = (float((logp - start)[leaves].mean()) for leaves in (chosen, rejected))
    after = float(logp.exp()[unseen].sum())
    return {"before": float(start.exp()[unseen].sum()), "after": after, "peak": max([*path, after]), "margin": up - down,
            "chosen": up, "rejected": down}  # fmt: skip


__all__ = ["Tree", "exhibit", "policy", "reference", "trained", "weights"]
