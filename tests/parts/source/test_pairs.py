"""Oracle of source/pairs: pairs listed by hand, and properties over random scores.

Bugs it is meant to catch: ties kept, the margin compared with the wrong sign, the rejected answer above the chosen one, the same
rejected answer every time, equal texts paired, answers without a score taken.
"""

from collections import Counter

import numpy as np
import pytest

from metier.core import part
from metier.core.data.examples import Preference, Ranked, Text
from metier.core.errors import UsageError
from metier.parts.source._pairs import choose, matched
from metier.testing import check_part

NAN = float("nan")


def rng(seed=0):
    return np.random.default_rng(seed)


def drawn(options, examples, seed=0):
    source = part.build("source", {"pairs": options}).obj
    return list(source.stream({"train": examples}, epoch=0, rng=rng(seed), progress=lambda: 0.0))


def test_contract():
    check_part("source/pairs")


def test_all_pairs_by_hand():
    assert choose("all", [1, 3, 3, 2], rng()) == [(1, 0), (1, 3), (2, 0), (2, 3), (3, 0)]
    assert choose("all", [1, 3, 3, 2], rng(), margin=2) == [(1, 0), (2, 0)]
    assert choose("all", [1, NAN, 3], rng()) == [(2, 0)]
    assert choose("all", [1, 2, 3], rng(), texts=["a", "a ", "b"]) == [(2, 0), (2, 1)]
    assert choose("all", [1, 1], rng()) == choose("all", [NAN, NAN], rng()) == []


def test_rounded_means_reach_the_margin():
    """(4 + 4 + 5)/3 and (3 + 3 + 4)/3 differ by 1, as doubles by a little less."""
    scores = [13 / 3, 10 / 3]
    assert scores[0] - scores[1] < 1
    assert choose("all", scores, rng(), margin=1.0) == choose("top-bottom", scores, rng(), margin=1.0) == [(0, 1)]
    assert choose("all", scores, rng(), margin=1.001) == []


def test_top_bottom_by_hand():
    assert choose("top-bottom", [1, 3, 3, 0], rng()) == [(1, 3)]
    assert choose("top-bottom", [1, 3], rng(), margin=2.5) == []
    assert choose("top-bottom", [2, 2], rng()) == []


def test_top_random_is_uniform_below_the_top():
    counts = Counter(choose("top-random", [1, 4, 4, 2, 3], rng(s))[0] for s in range(3000))
    assert set(counts) == {(1, 0), (1, 3), (1, 4)}
    assert all(abs(n - 1000) < 4 * (3000 * 2 / 9) ** 0.5 for n in counts.values())


@pytest.mark.parametrize("builder", ["all", "top-random", "top-bottom"])
@pytest.mark.parametrize("margin", [0.0, 1.0])
def test_chosen_is_never_below_rejected(builder, margin):
    for seed in range(300):
        scores = rng(seed).integers(1, 6, 4).astype(float)
        found = choose(builder, scores, rng(seed), margin=margin)
        assert all(scores[i] - scores[j] >= max(margin, 1) for i, j in found)
        wanted = max(scores) - min(scores) >= max(margin, 1)
        assert len(found) <= 6
        if builder != "all":
            assert len(found) == wanted


def test_pairs_of_lists():
    lists = [
        Ranked("p", ("a", "b", "c"), (0.5, 2.0, 1.0), id="f:1", meta={"k": 1}),
        Ranked("q", ("a", "b"), (1.0, 1.0), id="f:2"),
    ]
    got = {(e.prompt, e.chosen, e.rejected, e.margin, e.id, e.meta["k"]) for e in drawn({}, lists)}
    assert got == {("p", "b", "a", 1.5, "f:1#1-0", 1), ("p", "b", "c", 1.0, "f:1#1-2", 1), ("p", "c", "a", 0.5, "f:1#2-0", 1)}
    assert [e.margin for e in drawn({"margin": 1.2}, lists)] == [1.5]


def test_pairs_of_pairs():
    given = [Preference("p", "a", "b", m, id=f"f:{i}") for i, m in enumerate([None, 0.5, 2.0, 0.0, -1.0])]
    assert {e.id for e in drawn({"margin": 1.0}, given)} == {"f:0", "f:2"}
    assert {e.id for e in drawn({}, given)} == {"f:0", "f:1", "f:2"}


def test_order_is_random():
    lists = [Ranked(f"p{i}", ("a", "b"), (0.0, 1.0), id=f"f:{i}") for i in range(20)]
    orders = [[e.id for e in drawn({}, lists, seed)] for seed in (0, 1)]
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(f"f:{i}#1-0" for i in range(20))


def test_other_examples_are_refused():
    with pytest.raises(UsageError, match="lists of answers"):
        drawn({}, [Text("x", id="f:1")])


def test_matched_sets_have_the_same_scores():
    from scipy.stats import ks_2samp

    a, b = ([tuple(r) for r in rng(s).integers(0, 4, (n, 2)).tolist()] for s, n in ((1, 200), (2, 150)))
    left, right = matched(a, b, lambda r: r)
    assert Counter(left) == Counter(right) == Counter(a) & Counter(b)
    for k in (0, 1):
        assert ks_2samp([r[k] for r in left], [r[k] for r in right]).statistic == 0
    assert matched(a, [], lambda r: r) == ([], [])
