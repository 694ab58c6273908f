"""The world of condorcet-nash: empty answers are not the bad style, and shares are of all answers."""

import numpy as np
import pytest

from metier.core.errors import UsageError
from metier.core.nash import matrix
from metier.studies import _cyclic as world
from metier.studies.condorcet_nash import judged

START = [0.25, 0.25, 0.25, 0.25, 0.0]


def test_styles():
    assert world.style("") == world.style("  ") == world.EMPTY
    assert world.style("fox is kind") == world.BAD
    assert [world.style(f"{w} fox is kind") for w in ("please", "surely", "hence", "yeah")] == [0, 1, 2, world.BAD]


def test_preferences_are_a_cycle_above_bad_and_empty_answers():
    p = matrix(world.P)
    assert (p[:3, world.EMPTY] == p[:3, world.BAD]).all()
    assert p[world.BAD, world.EMPTY] == 0.5
    assert p[0, 1] == p[1, 2] == p[2, 0] == 0.7
    with pytest.raises(UsageError):
        matrix(world.P + 0.1)


def test_entropy_counts_only_without_bad_and_empty_answers():
    good = [1 / 3, 1 / 3, 1 / 3, 0.0, 0.0]

    def holds(nash):
        found = {"start": [START], "dpo": [good], "greedy": [[1.0, 0, 0, 0, 0]], "nash-md": [nash], "nash-rs": [good]}
        checks, figures = judged(found)
        return [c.holds for c in checks], figures

    held, figures = holds(good)
    assert held == [True] * 5
    assert figures["moved"]["start"] == 0
    assert figures["moved"]["nash-md"] == pytest.approx(0.25)
    assert not any(holds(START)[0][i] for i in (0, 1, 3))
    empty = (*np.full(3, 0.25), 0.0, 0.25)
    assert [holds(list(empty))[0][i] for i in (0, 1, 3, 4)] == [False, False, True, False]
