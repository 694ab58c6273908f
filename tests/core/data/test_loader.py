"""Oracle of core/data/loader: the order of examples, computed here from the seed; every split and resume must keep it.

Bugs it is meant to catch: an order that depends on micro-batch size, processes or threads; examples lost or seen twice around an
epoch's end, a resume or the last step; units of one process instead of all; other data accepted.
"""

import json
import threading
from collections import Counter
from itertools import islice, pairwise

import numpy as np
import pytest

from metier.core import models
from metier.core.context import derive_seed
from metier.core.data.encode import Encoder, Item
from metier.core.data.examples import Ranked
from metier.core.data.formats import examples
from metier.core.data.loader import Loader, Ramp, Shape, split_to
from metier.core.data.rows import open_rows
from metier.core.errors import MetierError, UsageError

N = 23


def item(i):
    n = 2 + (i * 7) % 9
    return Item(np.arange(i, i + n, dtype=np.int32), np.ones(n, bool), id=f"f:{i}")


ITEMS = [item(i) for i in range(N)]


def loader(items=ITEMS, stream=None, *, micro=None, packed=False, unit="token", budget=64, stop_at=None, **options):
    shape = Shape(0, budget, micro, packed, 30, unit)
    made = Loader(items, stream, shape, **{"fingerprint": {"train": "x"}, "seed": 5, "batch": 6, **options})
    made.stop_at = stop_at
    return made


def order(seed, epochs, n=N):
    """The order of the run, from its definition: a fresh permutation per epoch."""
    return [f"f:{i}" for e in range(epochs) for i in np.random.default_rng(derive_seed(seed, "order", e)).permutation(n)]


def ids(steps):
    return [sorted(s.ids) for s in steps]


def expected(seed=5, batch=6, count=12):
    flat = order(seed, 20)
    return [sorted(flat[k * batch : (k + 1) * batch]) for k in range(count)]


# --- order ---------------------------------------------------------------------------------------------------


def test_every_epoch_is_a_fresh_permutation_and_batches_run_over_its_end():
    steps = list(islice(loader(), 12))
    assert ids(steps) == expected()
    seen = Counter(i for s in steps for i in s.ids)
    assert set(seen.values()) <= {3, 4}
    assert len(seen) == N


def test_unshuffled():
    steps = list(islice(loader(shuffle=False, batch=5), 6))
    assert [i for s in ids(steps) for i in s] == [i for s in ids(steps) for i in s]
    flat = [f"f:{i % N}" for i in range(30)]
    assert ids(steps) == [sorted(flat[k * 5 : k * 5 + 5]) for k in range(6)]


@pytest.mark.parametrize("options", [
    {"micro": 1}, {"micro": 4}, {"micro": 100}, {"packed": True}, {"packed": True, "micro": 3}, {"budget": 1}, {"workers": 2},
    {"workers": 5, "micro": 2},
], ids=str)  # fmt: skip
def test_the_order_does_not_depend_on_how_it_is_computed(options):
    steps = list(islice(loader(**options), 12))
    assert ids(steps) == expected()
    assert [s.units for s in steps] == [s.units for s in islice(loader(), 12)]


def test_micro_batches_hold_each_example_once_within_their_size():
    for step in islice(loader(micro=4), 8):
        assert sorted(i for m in step.micro for i in m.ids) == sorted(step.ids)
        assert [len(m.ids) for m in step.micro] == [4, 2]
        assert step.units == sum(len(m.target) for m in step.micro)
    for step in islice(loader(budget=20), 8):
        assert all(m.input_ids.numel() <= 20 for m in step.micro)
        assert [m.input_ids.shape[1] for m in step.micro] == sorted((m.input_ids.shape[1] for m in step.micro), reverse=True)


def test_units_are_examples_where_the_loss_is_per_example():
    assert [s.units for s in islice(loader(unit="example"), 3)] == [6, 6, 6]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("world", "batch"), [(2, 6), (4, 6), (4, 8), (3, 5)])
@pytest.mark.parametrize("micro", [None, 1, 2])
def test_processes_share_the_same_steps(world, batch, micro, workers):
    """Also when the batch cannot be divided evenly, and in a smaller last step: the same examples, units and passes."""
    stop = 3 * batch + 1
    ranks = [list(loader(batch=batch, micro=micro, rank=r, world=world, workers=workers, stop_at=stop)) for r in range(world)]
    alone = list(loader(batch=batch, micro=micro, stop_at=stop))
    assert len(alone) == 4
    assert len(alone[-1].ids) == 1
    for parts, whole in zip(zip(*ranks, strict=True), alone, strict=True):
        assert sorted(i for p in parts for i in p.ids) == sorted(whole.ids)
        assert {p.units for p in parts} == {whole.units}
        assert len({len(p.micro) for p in parts}) == 1
        assert sum(len(m.target) for p in parts for m in p.micro if not m.filler) == whole.units
        assert sum(m.real_tokens for p in parts for m in p.micro) == sum(m.real_tokens for m in whole.micro)
        assert all(sorted(p.ids) == sorted(i for m in p.micro for i in m.ids) for p in parts)
        sizes = [len(p.ids) for p in parts]
        assert max(sizes) - min(sizes) <= 1


def test_more_processes_than_examples_are_refused():
    with pytest.raises(UsageError, match=r"train\.batch = 2"):
        loader(batch=2, world=4)


@pytest.mark.parametrize(("micros", "number", "result"), [
    ([[[0], [1], [2]]], 2, [[[0]], [[1], [2]]]),
    ([[[0, 1, 2]]], 2, [[[0]], [[1, 2]]]),
    ([[[0, 1]], [[2]]], 3, [[[0]], [[1]], [[2]]]),
    ([[[0]], [[1]]], 5, [[[0]], [[1]]]),
    ([], 2, []),
    ([[[0], [1]]], 1, [[[0], [1]]]),
], ids=str)  # fmt: skip
def test_split_to(micros, number, result):
    assert split_to(micros, number) == result


# --- the end -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop_at", [1, 5, 6, 7, N, 2 * N + 1])
def test_the_data_end_after_exactly_so_many_examples(stop_at, workers):
    made = loader(stop_at=stop_at, workers=workers)
    steps = list(made)
    assert [len(s.ids) for s in steps] == [6] * (stop_at // 6) + [stop_at % 6] * (stop_at % 6 > 0)
    assert sorted(i for s in steps for i in s.ids) == sorted(order(5, 3)[:stop_at])
    assert made.end_reason == "the data have ended"
    assert made.position == stop_at


# --- resuming ------------------------------------------------------------------------------------------------


def arrays(step):
    return (
        [(m.input_ids.tolist(), m.row.tolist(), m.col.tolist(), m.target.tolist(), m.ids) for m in step.micro],
        step.units,
        step.ids,
    )


@pytest.mark.parametrize("workers", [(0, 0), (2, 0), (0, 3)])
def test_resume_at_every_position(workers):
    before, after = workers
    full = [arrays(s) for s in loader(stop_at=50)]
    for k in range(len(full) + 1):
        first = loader(stop_at=50, workers=before)
        assert [arrays(s) for s in islice(first, k)] == full[:k]
        state = json.loads(json.dumps(first.state_dict()))
        second = loader(stop_at=50, workers=after)
        second.load_state_dict(state)
        assert [arrays(s) for s in second] == full[k:]


def test_another_batch_size_continues_at_the_same_example():
    first = loader()
    list(islice(first, 2))
    second = loader(batch=4)
    second.load_state_dict(first.state_dict())
    assert sorted(next(iter(second)).ids) == sorted(order(5, 1)[12:16])


def test_the_stored_seed_is_used():
    first, second = loader(), loader(seed=99)
    list(islice(first, 2))
    second.load_state_dict(first.state_dict())
    assert ids(islice(second, 3)) == expected()[2:5]
    assert ids(islice(loader(seed=99), 1)) != expected()[:1]


@pytest.mark.parametrize(("now", "named"), [
    ({"train": "other"}, "train"), ({"train": "x", "chunk": True}, "chunk"),
    ({"tokenizer": "t", "train": "y"}, "tokenizer, train"),
])  # fmt: skip
def test_other_data_are_refused_by_name(now, named):
    made = loader(fingerprint=now)
    with pytest.raises(UsageError, match=f"other data: {named} changed since") as e:
        made.load_state_dict(loader().state_dict())
    assert "--restart" in e.value.hint
    assert made.position == 0


def test_state_is_small():
    made = loader()
    list(islice(made, 5))
    assert len(json.dumps(made.state_dict())) < 200


# --- workers -------------------------------------------------------------------------------------------------


def test_threads_that_prepare_different_epochs_at_once_keep_the_order():
    """Steps of several epochs are prepared together; a shared permutation would be overwritten under a slow thread."""

    class Slow(list):
        def __getitem__(self, i):
            threading.Event().wait(0.0005 * (i % 3))
            return super().__getitem__(i)

    few = Slow(ITEMS[:5])
    got = ids(islice(loader(few, batch=4, workers=4), 30))
    flat = order(5, 40, n=5)
    assert got == [sorted(flat[k * 4 : k * 4 + 4]) for k in range(30)]


def test_an_item_that_cannot_be_read_stops_the_run():
    class Broken(list):
        def __getitem__(self, i):
            if i == 7:
                raise OSError("disk gone")
            return super().__getitem__(i)

    for workers in (0, 2):
        with pytest.raises(OSError, match="disk gone"):
            list(loader(Broken(ITEMS), workers=workers, stop_at=N))


# --- streams -------------------------------------------------------------------------------------------------


def source(sizes=(10, 7, 12), seen=None):
    """A stream whose epochs differ in length and content; ``seen`` records progress as each item is made."""

    def stream(epoch, progress):
        for i in range(sizes[epoch % len(sizes)]):
            if seen is not None:
                seen.append(progress())
            yield Item(np.arange(3, dtype=np.int32), np.ones(3, bool), id=f"e{epoch}:{i}")

    return stream


def flat(count):
    out = []
    epoch = 0
    while len(out) < count:
        out += [f"e{epoch}:{i}" for i in range((10, 7, 12)[epoch % 3])]
        epoch += 1
    return out[:count]


def test_a_stream_is_taken_in_order_over_the_ends_of_its_epochs():
    steps = list(islice(loader(None, source()), 10))
    assert ids(steps) == [sorted(flat(60)[k * 6 : k * 6 + 6]) for k in range(10)]


@pytest.mark.parametrize("batch", [1, 4, 5, 25])
def test_streams_resume_at_every_position(batch):
    full = [arrays(s) for s in islice(loader(None, source(), batch=batch), 30)]
    for k in range(0, 29, 1 if batch > 1 else 3):
        first = loader(None, source(), batch=batch)
        list(islice(first, k))
        second = loader(None, source(), batch=batch)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert arrays(next(iter(second))) == full[k]


def test_progress_is_that_of_the_example_and_the_same_after_a_resume():
    seen = []
    made = loader(None, source(seen=seen), batch=6)
    made.expected = 60
    list(islice(made, 10))
    assert seen == pytest.approx([i / 60 for i in range(60)])
    again = []
    first = loader(None, source(), batch=6)
    first.expected = 60
    list(islice(first, 3))
    second = loader(None, source(seen=again), batch=6)
    second.expected = 60
    second.load_state_dict(first.state_dict())
    list(islice(second, 7))
    # the epoch of the 18th example began at the 17th, and is made again from there
    assert again == pytest.approx([i / 60 for i in range(17, 60)])
    assert all(a <= b for a, b in pairwise(again))


def test_a_stream_that_raises_is_named():
    def stream(epoch, progress):
        for i in range(30):
            if i == 16:
                raise ZeroDivisionError("rate / 0")
            yield item(i)

    got = []
    with pytest.raises(MetierError, match=r"failed at example 17 of epoch 1: ZeroDivisionError: rate / 0"):
        got.extend(loader(None, stream))
    assert len(got) == 2


def test_messages_for_people_are_not_wrapped():
    def stream(epoch, progress):
        raise UsageError("no weight for b")
        yield

    with pytest.raises(UsageError, match=r"^no weight for b$"):
        next(iter(loader(None, stream)))


@pytest.mark.parametrize("sizes", [(0,), (8, 0)])
def test_a_stream_without_examples_ends_the_data_with_a_reason(sizes):
    made = loader(None, source(sizes))
    steps = list(made)
    assert len(steps) == (1 if sizes[0] else 0)
    assert made.end_reason == f"the data source gave no example in epoch {len(sizes)}"
    assert made.state_dict()["position"] == 6 * len(steps)
    again = loader(None, source((8, 5)))
    again.load_state_dict(made.state_dict())
    assert sorted(next(iter(again)).ids) == flat_of((8, 5), 6 * len(steps))


def flat_of(sizes, begin):
    out = [f"e{e}:{i}" for e, n in enumerate(sizes * 2) for i in range(n)]
    return sorted(out[begin : begin + 6])


def test_a_stream_that_got_shorter_cannot_be_resumed():
    first = loader(None, source((20,)))
    list(islice(first, 3))
    second = loader(None, source((11,)))
    second.load_state_dict(first.state_dict())
    with pytest.raises(MetierError, match="gave 11 examples in epoch 1, but 18 before"):
        next(iter(second))


def test_a_stream_shared_by_processes():
    parts = [list(islice(loader(None, source(), rank=r, world=2), 5)) for r in range(2)]
    whole = list(islice(loader(None, source()), 5))
    for a, b, w in zip(*parts, whole, strict=True):
        assert sorted([*a.ids, *b.ids]) == sorted(w.ids)


# --- a growing batch ---------------------------------------------------------------------------------------


def test_a_ramp_grows_in_equal_stretches_of_examples():
    ramp = Ramp(start=2, increment=2, examples=12)  # three increments: every 4 examples
    assert [ramp.at(p, 8) for p in (0, 3, 4, 7, 8, 11, 12, 100)] == [2, 2, 4, 4, 6, 6, 8, 8]
    assert Ramp(2, 4, 10).at(9, 8) == 6
    assert Ramp(2, 4, 10).at(10, 8) == 8  # never above the full batch


def test_a_ramp_changes_the_size_of_steps_but_not_the_order_of_examples():
    items = [item(i) for i in range(40)]
    flat = order(5, 1, 40)
    ramped = loader(items, batch=8, ramp=Ramp(2, 2, 12))
    steps = list(islice(iter(ramped), 6))
    assert [len(s.ids) for s in steps] == [2, 2, 4, 6, 8, 8]
    assert [sorted(s.ids) for s in steps[:3]] == [sorted(flat[:2]), sorted(flat[2:4]), sorted(flat[4:8])]
    assert ramped.steps_for(22) == 5
    assert ramped.steps_for(23) == 6
    assert ramped.examples_in(6) == 30


def test_a_ramp_resumes_at_its_place():
    items = [item(i) for i in range(40)]
    whole = [s.ids for s in islice(iter(loader(items, batch=8, ramp=Ramp(2, 2, 12))), 8)]
    first = loader(items, batch=8, ramp=Ramp(2, 2, 12))
    head = [s.ids for s in islice(iter(first), 3)]
    second = loader(items, batch=8, ramp=Ramp(2, 2, 12))
    second.load_state_dict(first.state_dict())
    assert second.batch_at(8) == 6
    assert second.position == 8
    assert head + [s.ids for s in islice(iter(second), 5)] == whole


def test_a_ramp_that_begins_below_the_number_of_processes_is_refused():
    with pytest.raises(UsageError, match="start = 1 leaves"):
        loader([item(0)], batch=8, ramp=Ramp(1, 1, 10), world=2)


# --- packing real preference data ----------------------------------------------------------------------------


def solutions(path, kind):
    """Graded solutions to GSM8K problems: pairs of a right and a wrong one, or all of a problem as a list."""
    pairs = examples(open_rows(str(path)), "graded-solutions", notice=lambda text: None)
    if kind == "pairs":
        return pairs
    found = {}
    for row in map(json.loads, path.read_text().splitlines()):
        graded = [v for v in row.values() if isinstance(v, dict) and "solution" in v]
        found[row["question"]] = [(g["solution"], float(g["is_correct"])) for g in graded]
    return [Ranked(q, *map(tuple, zip(*answers, strict=True)), id=q[:20]) for q, answers in found.items()]


@pytest.mark.real
@pytest.mark.parametrize("batch", [8, 64, 256, None], ids=str)
@pytest.mark.parametrize("kind", ["pairs", "lists"])
def test_packed_preferences_waste_little(kind, batch, shared_data):
    """At least 95 % of what is computed is text, in every micro-batch of every step."""
    encoder = Encoder(models.tokenizer_of("lab/llama-50k"), max_length=1024, truncate="drop", on_empty="drop")
    items = encoder.all(solutions(shared_data / "gsm8k-model-solutions.jsonl", kind))
    shape = Shape(0, 16384, packed=True, max_length=1024, unit="example")
    made = Loader(items, None, shape, fingerprint={}, seed=0, batch=batch or len(items))
    real = area = 0
    for step in islice(made, min(20, len(items) // made.batch)):
        for layout in step.micro:
            assert layout.real_tokens >= 0.95 * layout.input_ids.numel()
            real, area = real + layout.real_tokens, area + layout.input_ids.numel()
    assert real >= 0.96 * area


def test_padding_that_costs_less_than_a_pass_is_taken():
    """All rows in one micro-batch when their padding is spare, not a token earlier; the budget still holds."""
    items = [item(i) for i in range(23)]
    total = 23 * max(i.length for i in items)
    padding = total - sum(i.length for i in items)
    assert len(Shape(0, 1000, spare=0).micros(items)) > 1
    assert len(Shape(0, 1000, spare=padding - 1).micros(items)) == 2
    assert len(Shape(0, 1000, spare=padding).micros(items)) == 1
    assert len(Shape(0, total - 1, spare=padding).micros(items)) == 2


def test_a_tiny_model_takes_padding_and_a_large_one_does_not():
    from types import SimpleNamespace

    import torch

    from metier.core.data.budget import spare_tokens

    def model(size):
        return SimpleNamespace(parameters=lambda: [torch.empty(size, device="meta")])

    assert spare_tokens(model(120_000), "cpu") == 1388
    assert spare_tokens(model(135_000_000), "cpu") == 1
    assert spare_tokens(model(135_000_000), "cuda") == 123
