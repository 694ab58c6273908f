"""Oracle of source/mix: proportions counted, and worked out by hand.

Bugs it is meant to catch: T applied as w^T, choices by remainder instead of deficit, an input exhausted but
not reshuffled, an epoch that ends early or never.
"""

from collections import Counter
from itertools import islice

import numpy as np
import pytest

from metier.core import part
from metier.core.data.formats import Text
from metier.core.errors import UsageError
from metier.testing import check_part


def inputs(**sizes):
    return {n: [Text(text=f"{n}{i}", id=f"{n}:{i}") for i in range(k)] for n, k in sizes.items()}


def drawn(options, rows, seed=0, most=10_000):
    source = part.build("source", {"mix": options}).obj
    rng = np.random.default_rng(seed)
    return list(islice(source.stream(rows, epoch=0, rng=rng, progress=lambda: 0.0), most))


def names(examples):
    return [e.id.split(":")[0] for e in examples]


def test_contract():
    check_part("source/mix")


def test_shares_follow_the_temperature():
    sizes = {"a": 900, "b": 90, "c": 10}
    for t in (0.5, 1.0, 3.0, 1e6):
        w = {n: s ** (1 / t) for n, s in sizes.items()}
        expected = {n: v / sum(w.values()) for n, v in w.items()}
        assert part.build("source", {"mix": {"temperature": t}}).obj.shares(sizes) == pytest.approx(expected)


def test_exact_keeps_every_prefix_in_proportion():
    weights = {"a": 0.5, "b": 0.3, "c": 0.2}
    got = names(drawn({"weights": weights}, inputs(a=500, b=500, c=500)))
    counts = Counter()
    for n, name in enumerate(got, 1):
        counts[name] += 1
        assert all(abs(counts[k] - w * n) < 1 for k, w in weights.items())


def test_exact_by_hand():
    assert names(drawn({"weights": {"a": 2, "b": 1}, "stop": "first_exhausted"}, inputs(a=4, b=9))) == list("abaaba")


def test_sampled_proportions_are_within_the_binomial_error():
    got = Counter(names(drawn({"weights": {"a": 0.8, "b": 0.2}, "choice": "sampled"}, inputs(a=3000, b=700), most=3000)))
    assert abs(got["a"] - 2400) < 4 * (3000 * 0.8 * 0.2) ** 0.5


def test_all_exhausted_sees_everything_and_repeats_in_new_orders():
    got = drawn({"weights": {"a": 1, "b": 1}}, inputs(a=20, b=5))
    count = Counter(e.id for e in got)
    assert all(count[f"a:{i}"] == 1 for i in range(20))
    assert {count[f"b:{i}"] for i in range(5)} <= {3, 4}
    small = [e.id for e in got if e.id.startswith("b")]
    passes = [tuple(small[i : i + 5]) for i in range(0, 15, 5)]
    assert all(sorted(p) == sorted(passes[0]) for p in passes)
    assert len(set(passes)) == 3


def test_first_exhausted_repeats_nothing():
    got = drawn({"weights": {"a": 1, "b": 1}, "stop": "first_exhausted"}, inputs(a=20, b=5))
    assert len(got) == len({e.id for e in got})
    assert Counter(names(got))["b"] == 5


def test_default_is_one_pass_over_everything():
    got = drawn({}, inputs(a=20, b=5))
    assert sorted(e.id for e in got) == sorted(e.id for rows in inputs(a=20, b=5).values() for e in rows)


def test_an_inputs_own_order_does_not_depend_on_the_weights():
    order = [[e.id for e in drawn({"weights": {"a": 1, "b": w}}, inputs(a=30, b=30)) if e.id[0] == "b"][:10] for w in (1, 3)]
    assert order[0] == order[1]


def test_zero_weight_leaves_an_input_out():
    assert set(names(drawn({"weights": {"a": 1, "b": 0}}, inputs(a=3, b=3)))) == {"a"}


@pytest.mark.parametrize(
    ("options", "message"),
    [({"weights": {"a": 1, "bb": 1}}, "Did you mean 'b'"), ({"weights": {"a": 1}}, "no weight for b"),
     ({"weights": {"a": 0, "b": 0}}, "every weight is 0"), ({"weights": {"a": -1, "b": 1}}, "weights")],
)  # fmt: skip
def test_wrong_weights_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        drawn(options, inputs(a=2, b=2))


def test_empty_inputs_are_refused():
    with pytest.raises(UsageError, match="b holds no examples"):
        drawn({"weights": {"a": 1, "b": 1}}, inputs(a=2, b=0))
    with pytest.raises(UsageError, match="no input"):
        drawn({}, inputs(a=0))
