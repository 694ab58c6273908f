"""Oracle of core/data/collate: arrays written by hand.

Bugs it is meant to catch: targets predicted one column off, the second answer predicted by the end of the first, positions or
groups that run on, answers numbered per row instead of per batch, values per target taken from the wrong token.
"""

import itertools

import numpy as np
import pytest
import torch

from metier.core.data.collate import collate, pack
from metier.core.data.encode import Item


def ids(*values):
    return np.array(values, dtype=np.int32)


def mask(*values):
    return np.array(values, dtype=bool)


def text(*tokens, off=0, id="t", label=None, extra=None):
    return Item(ids(*tokens), np.arange(len(tokens)) >= off, id=id, label=label, extra=extra or {})


def pair(prompt, *answers, id="p", label=None, extra=None):
    loss = tuple(np.ones(len(a), bool) for a in answers)
    return Item(ids(*prompt), np.zeros(len(prompt), bool), tuple(ids(*a) for a in answers), loss, id, label, extra or {})


def listed(layout, *names):
    return [getattr(layout, n).tolist() for n in names]


def test_texts_padded():
    layout = collate([text(11, 12, 13, id="a"), text(21, 22, off=2, id="b"), text(31, 32, 33, 34, off=2, id="c")], pad_id=7)
    assert listed(layout, "input_ids", "position_ids", "group", "branch") == [
        [[11, 12, 13, 7], [21, 22, 7, 7], [31, 32, 33, 34]],
        [[0, 1, 2, 0], [0, 1, 0, 0], [0, 1, 2, 3]],
        [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]],
        [[0] * 4] * 3,
    ]
    assert listed(layout, "row", "col", "target", "sequence") == [[0, 0, 2, 2], [0, 1, 1, 2], [12, 13, 33, 34], [0, 0, 2, 2]]
    assert (layout.ids, layout.answers, layout.label, layout.weight) == (("a", "b", "c"), (1, 1, 1), None, None)


def test_scattered_targets():
    item = Item(ids(1, 2, 3, 4, 5), mask(1, 0, 1, 1, 0), id="x")
    assert listed(collate([item], pad_id=0), "col", "target") == [[1, 2], [3, 4]]


def test_pair():
    layout = collate([pair([11, 12], [13, 14, 15], [16, 17])], pad_id=7)
    assert listed(layout, "input_ids", "position_ids", "group", "branch") == [
        [[11, 12, 13, 14, 15, 16, 17]],
        [[0, 1, 2, 3, 4, 2, 3]],
        [[1] * 7],
        [[0, 0, 1, 1, 1, 2, 2]],
    ]
    assert listed(layout, "row", "col", "target", "sequence") == [
        [0] * 5, [1, 2, 3, 1, 5], [13, 14, 15, 16, 17], [0, 0, 0, 1, 1],
    ]  # fmt: skip
    assert layout.answers == (2,)


def test_packed_row_of_a_text_and_a_list():
    made = [pair([11], [12], [13, 14], [15]), text(21, 22, 23), pair([31, 32], [33], [34])]
    layout = collate(made, pad_id=7, rows=[[2], [1, 0]])
    assert listed(layout, "input_ids", "position_ids", "group", "branch") == [
        [[31, 32, 33, 34, 7, 7, 7, 7], [21, 22, 23, 11, 12, 13, 14, 15]],
        [[0, 1, 2, 2, 0, 0, 0, 0], [0, 1, 2, 0, 1, 1, 2, 1]],
        [[1, 1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 2, 2, 2, 2, 2]],
        [[0, 0, 1, 2, 0, 0, 0, 0], [0, 0, 0, 0, 1, 2, 2, 3]],
    ]
    assert listed(layout, "row", "col", "target", "sequence") == [
        [1, 1, 1, 1, 1, 1, 0, 0], [3, 3, 5, 3, 0, 1, 1, 1], [12, 13, 14, 15, 22, 23, 33, 34], [0, 1, 1, 2, 3, 3, 4, 5],
    ]  # fmt: skip
    assert layout.answers == (3, 1, 2)


def test_answers_with_partial_loss():
    item = Item(ids(1, 2), mask(0, 1), (ids(3, 4), ids(5, 6)), (mask(0, 1), mask(1, 0)), "x")
    assert item.targets == 3
    layout = collate([item], pad_id=0)
    assert listed(layout, "col", "target", "sequence") == [[0, 2, 1], [2, 4, 5], [0, 0, 1]]


def test_labels():
    assert collate([text(1, 2, label=1), text(3, 4, label=0)], pad_id=0).label.tolist() == [1, 0]
    assert collate([text(1, 2, label=True), text(3, 4, label=False)], pad_id=0).label.dtype == torch.bool
    lists = [pair([1], [2], [3], [4], label=(1.0, 2.0, 3.0)), pair([1], [2], [3], label=(5.0, 4.0))]
    assert collate(lists, pad_id=0).label.tolist() == [[1.0, 2.0, 3.0], [5.0, 4.0, 0.0]]
    assert collate([text(1, 2, label=0.5), text(3, 4)], pad_id=0).label is None


def test_extra_inputs_lie_where_their_tokens_lie():
    made = [
        text(11, 12, extra={"kind": np.array([1, 2])}),
        text(21, 22, 23),
        pair([31], [32], [33], extra={"kind": np.array([3, 4, 5])}),
    ]
    layout = collate(made, pad_id=0, rows=[[1, 0], [2]])
    assert layout.extra["kind"].tolist() == [[0, 0, 0, 1, 2], [3, 4, 5, 0, 0]]


def test_values_per_target():
    extra = {
        "weight": np.array([9.0, 0.1, 0.2, 0.3]),
        "old_logps": np.array([9.0, -1, -2, -3]),
        "reference": np.array([9.0, -4, -5, -6]),
    }
    layout = collate([text(21, 22), pair([31], [32, 33], [34], extra=extra)], pad_id=0)
    assert listed(layout, "target", "weight", "old_logps", "reference") == [
        [22, 32, 33, 34], [1, 0.1, 0.2, 0.3], [0, -1, -2, -3], [0, -4, -5, -6],
    ]  # fmt: skip
    assert layout.extra == {}


def test_nothing_to_predict():
    layout = collate([text(1, 2, off=2), text(3)], pad_id=0)
    assert listed(layout, "row", "col", "target", "sequence") == [[], [], [], []]
    assert layout.target.dtype == torch.int64


@pytest.mark.parametrize("capacity", [10, 17, 100])
def test_pack(capacity):
    lengths = np.random.default_rng(0).integers(1, 11, 50).tolist()
    rows = pack(lengths, capacity)
    assert sorted(i for r in rows for i in r) == list(range(50))
    sums = [sum(lengths[i] for i in r) for r in rows]
    assert max(sums) <= capacity
    # first fit: no two rows could share one
    assert all(a + b > capacity for a, b in itertools.combinations(sums, 2))
    assert rows == pack(lengths, capacity)


def test_pack_gives_what_is_too_long_a_row_of_its_own():
    assert pack([3, 30, 2], 5) == [[1], [0, 2]]
