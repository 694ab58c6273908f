"""Pairs from scored answers, by a rule of one's choice."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from metier.core.data.examples import Preference, Ranked
from metier.core.errors import UsageError
from metier.core.part import NonNegative, part
from metier.parts.source._pairs import Builder, choose, preference


@part("source/pairs", paper="arXiv:2310.01377, section 2 (all pairs); arXiv:2310.16944, section 4 (top-random)", rows=(79,))
class Pairs:
    """Lists of answers with scores become pairs; ties are dropped, the gap is kept as the pair's margin.

    ``builder``: ``all`` gives every pair of different scores, ``top-random`` the best answer and one drawn from those below it
    (another in each epoch), ``top-bottom`` the best and the worst. ``margin`` is the least gap. Pairs that come with a margin
    pass when it is large enough. In random order. Without this source, an objective that wants pairs reads lists ``top-bottom``.
    """

    takes = (Ranked, Preference)
    example: ClassVar = {}

    def __init__(self, *, builder: Builder = "all", margin: NonNegative = 0.0) -> None:
        self.builder: Builder = builder
        self.margin = margin

    def stream(
        self, inputs: Mapping[str, Sequence[Any]], *, epoch: int, rng: np.random.Generator, progress: Callable[[], float]
    ) -> Iterator[Preference]:
        """The pairs of one epoch."""
        found = [pair for rows in inputs.values() for e in rows for pair in self._pairs(e, rng)]
        yield from (found[i] for i in rng.permutation(len(found)))

    def _pairs(self, e: Any, rng: np.random.Generator) -> list[Preference]:
        if isinstance(e, Preference):
            return [e] if e.margin is None or (e.margin > 0 and e.margin >= self.margin) else []
        if not isinstance(e, Ranked):
            raise UsageError("source/pairs reads lists of answers with scores, or pairs", where=e.id or None)
        chosen = choose(self.builder, e.scores, rng, texts=e.completions, margin=self.margin)
        return [preference(e, e.prompt, e.completions, e.scores, pair) for pair in chosen]
