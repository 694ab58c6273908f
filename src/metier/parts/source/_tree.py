"""A search tree over partial answers (MCTS): nodes end at sentences or after some tokens; values are rewards of whole answers."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from metier.core.sample import Answer


@dataclass(frozen=True)
class Whole:
    """A finished answer: a rollout."""

    ids: np.ndarray
    """``[T]`` int32 with the end token."""
    text: str
    score: float


@dataclass(eq=False)
class Node:
    """A partial answer."""

    ids: np.ndarray
    """``[T]`` int32: the tokens of the answer so far."""
    prior: float = 1.0
    done: bool = False
    """Whether the answer ends here."""
    children: list["Node"] = field(default_factory=list)
    visits: int = 0
    total: float = 0.0
    wholes: list[Whole] = field(default_factory=list)
    """Rollouts that passed through here."""

    @property
    def value(self) -> float:
        """Q: mean of the values backed up; 0 before any."""
        return self.total / self.visits if self.visits else 0.0


def uct(child: Node, visits: int, constant: float) -> float:
    """``Q + c P √N_parent / (1 + N)``: the card's rule, which is a specification of ours."""
    return child.value + constant * child.prior * math.sqrt(visits) / (1 + child.visits)


def selected(root: Node, constant: float) -> list[Node]:
    """The path from the root to the leaf that the rule leads to; the first of equals."""
    path = [root]
    while path[-1].children:
        visits = path[-1].visits
        path.append(max(path[-1].children, key=lambda n: uct(n, visits, constant)))
    return path


def cut(answer: Answer, decode: Callable[[np.ndarray], str], longest: int) -> int:
    """Tokens of an answer's first segment: up to the end of a sentence or line, at most ``longest``."""
    for n in range(1, min(longest, len(answer.ids)) + 1):
        if decode(answer.ids[:n]).rstrip(" ").endswith((".", "!", "?", "\n")):
            return n
    return min(longest, len(answer.ids))


def expand(
    path: Sequence[Node], answers: Sequence[Answer], values: Sequence[float], texts: Sequence[str], lengths: Sequence[int],
    usable: Sequence[bool],
) -> None:  # fmt: skip
    """Give the leaf of ``path`` a child for each answer that continues it, and back their values up.

    ``texts`` are the whole answers, ``lengths`` the tokens of the first segments; equal segments share a child. Answers that are
    not ``usable`` (they did not end) count with their value, but are no rollouts to make pairs from. The prior of a child is its
    share of the mean token probabilities of the different segments: the priors of siblings sum to 1.
    """
    leaf = path[-1]
    for a, value, text, n, good in zip(answers, values, texts, lengths, usable, strict=True):
        ids = np.concatenate([leaf.ids, a.ids[:n]]).astype(np.int32)
        child = next((c for c in leaf.children if np.array_equal(c.ids, ids)), None)
        if child is None:
            child = Node(ids, math.exp(float(a.logps[:n].mean())) if n else 0.0, done=n == len(a.ids))
            leaf.children.append(child)
        whole = Whole(np.concatenate([leaf.ids, a.ids]).astype(np.int32), text, value)
        back_up([*path, child], value, whole if good else None)
    total = sum(c.prior for c in leaf.children) or 1.0
    for child in leaf.children:
        child.prior /= total


def back_up(path: Sequence[Node], value: float, whole: Whole | None = None) -> None:
    """Count a visit with ``value`` for every node of the path."""
    for node in path:
        node.visits += 1
        node.total += value
        if whole is not None:
            node.wholes.append(whole)


def nodes(root: Node) -> Iterator[Node]:
    """All nodes, parents before children."""
    yield root
    for child in root.children:
        yield from nodes(child)


def siblings(root: Node) -> Iterator[tuple[Node, Whole, Whole]]:
    """``(parent, better, worse)``: rollouts through two children of a node, the one with the higher value scoring higher.

    Both begin with the parent's tokens.
    """
    for parent in nodes(root):
        for a in parent.children:
            for b in parent.children:
                if a.value > b.value:
                    yield from ((parent, x, y) for x in a.wholes for y in b.wholes if x.score > y.score)


def shared(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the longest common prefix in tokens."""
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if len(differ) else n
