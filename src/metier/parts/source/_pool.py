"""A pool of ways to answer, for diverse answers of one model: temperatures, and system prompts for principles."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from metier.core.data.examples import Prompt
from metier.core.errors import UsageError, unknown
from metier.core.policy import Policy
from metier.parts.source._pairs import with_system
from metier.parts.source._rounds import seed

PRINCIPLES = {
    "helpfulness": (
        "Be as useful as you can: answer everything that is asked, in detail and in good order.",
        "Think of what the person needs, and give practical and complete help.",
    ),
    "truthfulness": (
        "State only what is true. Where the request rests on something false, say so.",
        "Stay with the facts; do not invent names, numbers or sources.",
    ),
    "honesty": (
        "Say plainly what you know and what you do not know.",
        "Do not pretend to be sure; admit the limits of your knowledge.",
    ),
    "calibration": (
        "Say with each claim how sure you are of it, in per cent.",
        "Answer, then state your confidence between 0 and 100 %.",
    ),
}
"""System prompts by principle; wording ours."""


@dataclass(frozen=True)
class Pool:
    """Who answers, and how. Raises ``UsageError`` for an empty pool or an unknown principle."""

    models: tuple[str, ...] = ()
    """Beside the model being trained: folders, runs or names."""
    temperatures: tuple[float, ...] = (1.0,)
    principles: Mapping[str, float] = field(default_factory=dict)
    """Odds of the principles; empty: no system prompt."""
    max_new_tokens: int = 64
    finished: bool = True

    def __post_init__(self) -> None:
        if not self.temperatures:
            raise UsageError("the pool has no temperature")
        for name in self.principles:
            if name not in PRINCIPLES:
                raise unknown("principle", name, PRINCIPLES)

    @property
    def members(self) -> list[tuple[str | None, float]]:
        """``(model, temperature)``; ``None`` is the model being trained."""
        return [(m, t) for m in (None, *self.models) for t in self.temperatures]


def completions(
    policy: Policy, prompts: Sequence[Prompt], number: int, rng: np.random.Generator, pool: Pool
) -> list[tuple[str, ...]]:
    """Up to ``number`` answers to each prompt, each from another member of the pool as long as it lasts.

    Answers that did not end (with ``finished``) and blank ones are left out.
    """
    drawn = [_members(len(pool.members), number, rng) for _ in prompts]
    asked = [[_with_principle(p, pool.principles, rng) for _ in range(number)] for p in prompts]
    written: dict[tuple[int, int], str] = {}
    for m, (model, temperature) in enumerate(pool.members):
        places = [(i, k) for i, members in enumerate(drawn) for k, member in enumerate(members) if member == m]
        if not places:
            continue
        writer = policy if model is None else policy.other(model)
        answers = writer.sample(
            [asked[i][k] for i, k in places], 1, max_new_tokens=pool.max_new_tokens, temperature=temperature, seed=seed(rng)
        )
        kept = zip(places, (row[0] for row in answers), strict=True)
        written |= {place: a.text for place, a in kept if (a.ended or not pool.finished) and a.text.strip()}
    return [tuple(written[i, k] for k in range(number) if (i, k) in written) for i in range(len(prompts))]


def _members(pool: int, number: int, rng: np.random.Generator) -> list[int]:
    """``number`` members without replacement, over and over when the pool is smaller."""
    rounds = -(-number // pool)
    return [int(m) for _ in range(rounds) for m in rng.permutation(pool)][:number]


def _with_principle(prompt: Prompt, odds: Mapping[str, float], rng: np.random.Generator) -> Prompt:
    """The prompt with a system prompt of a principle drawn by its odds; as it is without odds."""
    total = sum(odds.values())
    if total <= 0:
        return prompt
    names = list(odds)
    texts = PRINCIPLES[names[int(rng.choice(len(names), p=[odds[n] / total for n in names]))]]
    return with_system(prompt, texts[int(rng.integers(len(texts)))])
