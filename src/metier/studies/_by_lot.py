"""The control for a threshold: ``source/ssrm`` picks a given number of pairs by lot."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np

from metier.parts.source import ssrm


@contextmanager
def by_lot(counts: Sequence[int] | None) -> Iterator[None]:
    """Within, ``source/ssrm`` with ``selection: random`` picks ``counts[t]`` pairs in its ``t``-th round of labelling.

    By itself it picks as many as *its* model is sure of, which differs from what the model of another run is sure of. ``None``
    changes nothing.
    """
    if counts is None:
        yield
        return
    whole = ssrm.Ssrm.round

    def picked(self: Any, inputs: Any, *, policy: Any, round: int, rng: np.random.Generator) -> Any:
        number = counts[round - 1] if round else 0
        with patch.object(ssrm, "selected", lambda p, threshold: np.arange(len(p)) < number):
            return whole(self, inputs, policy=policy, round=round, rng=rng)

    with patch.object(ssrm.Ssrm, "round", picked):
        yield
