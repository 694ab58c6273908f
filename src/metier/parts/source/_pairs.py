"""From several scored answers to pairs, and answers judged by a reward: shared by the sources that build preference pairs."""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np

from metier.core import part as parts
from metier.core.config import PartRef
from metier.core.data.examples import Message, Preference, Prompt
from metier.core.judging import judged, known_answers, plain

__all__ = ["choose", "judged", "known_answers", "last", "plain", "preference", "reward_of", "with_last", "with_system"]

Builder = Literal["all", "top-random", "top-bottom"]
Pair = tuple[int, int]
"""Indices of the better and the worse answer."""
EPS = 1e-6
"""Gaps this far below the margin reach it: means of ratings such as 13/3 and 10/3 are rounded."""


def choose(
    builder: Builder, scores: Sequence[float] | np.ndarray, rng: np.random.Generator, *, texts: Sequence[str] | None = None,
    margin: float = 0.0,
) -> list[Pair]:  # fmt: skip
    """Pairs ``(i, j)`` with ``s_i > s_j`` and ``s_i - s_j >= margin``; answers without a score (NaN) are left out.

    ``all``: every such pair. ``top-random``: the answer with the highest score (the first of equals) against one drawn uniformly
    from those that it beats so. ``top-bottom``: against the one with the lowest score. Answers that read the same make no pair.
    """
    assert builder in get_args(Builder)
    s = np.asarray(scores, np.float64)
    there = [int(i) for i in np.flatnonzero(~np.isnan(s))]

    def beats(i: int, j: int) -> bool:
        same = texts is not None and texts[i].strip() == texts[j].strip()
        return s[i] > s[j] and s[i] - s[j] >= margin - EPS and not same

    if builder == "all":
        return [(i, j) for i in there for j in there if beats(i, j)]
    best = max(there, key=lambda i: s[i], default=-1)
    worse = [j for j in there if beats(best, j)]
    if not worse:
        return []
    return [(best, worse[int(rng.integers(len(worse)))] if builder == "top-random" else min(worse, key=lambda j: s[j]))]


def preference(e: Any, prompt: Prompt, texts: Sequence[str], scores: Sequence[float] | np.ndarray, pair: Pair) -> Preference:
    """The pair as an example made from ``e``; the gap of the scores is its margin."""
    i, j = pair
    id = f"{e.id}#{i}-{j}" if e.id else ""
    return Preference(prompt, texts[i], texts[j], float(scores[i] - scores[j]), id=id, meta=e.meta)


# --- judging -----------------------------------------------------------------------------------------------------


def reward_of(ref: PartRef, owner: str, option: str) -> Any:
    """The reward part that an option of a source names."""
    return parts.build("reward", ref, where=lambda o: f"{owner}, option {option}{', option ' + o if o else ''}").obj


def with_system(prompt: Prompt, system: str) -> Prompt:
    """The prompt with a system message before it, or joined to the one it has."""
    turns = (Message("user", prompt),) if isinstance(prompt, str) else prompt
    if turns[0].role == "system":
        return (Message("system", f"{turns[0].content}\n\n{system}"), *turns[1:])
    return (Message("system", system), *turns)


def with_last(prompt: Prompt, text: str) -> Prompt:
    """The prompt with the text of its last turn exchanged."""
    return text if isinstance(prompt, str) else (*prompt[:-1], Message(prompt[-1].role, text))


def last(prompt: Prompt) -> str:
    """The text of a prompt's last turn."""
    return prompt if isinstance(prompt, str) else prompt[-1].content


# --- matching ----------------------------------------------------------------------------------------------------


def matched(a: Sequence[Any], b: Sequence[Any], key: Any) -> tuple[list[Any], list[Any]]:
    """The largest parts of ``a`` and ``b`` in which every value of ``key`` occurs equally often, each in its own order.

    With the two scores of a pair as key, both have the same histogram of scores: their Kolmogorov-Smirnov distance is 0.
    """
    left: dict[Any, list[int]] = {}
    for i, x in enumerate(b):
        left.setdefault(key(x), []).append(i)
    kept_a, kept_b = [], []
    for i, x in enumerate(a):
        if waiting := left.get(key(x)):
            kept_a.append(i)
            kept_b.append(waiting.pop(0))
    return [a[i] for i in kept_a], [b[i] for i in sorted(kept_b)]
