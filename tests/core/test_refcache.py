"""Reference scores on disk: the same training as with a live reference, resumable, refused when they belong to another model.

Bugs it is meant to catch: scores at the wrong tokens or items, a cache that survives another model, template or data, a
damaged block that is believed, an interrupted computation that starts anew or leaves a hole.
"""

import json

import numpy as np
import pytest
import torch

from metier import train
from metier.core import refcache
from metier.core.data.collate import collate
from metier.core.data.encode import Item
from metier.core.errors import UsageError
from metier.core.refcache import Identity, with_reference

MODEL = Identity("lab/llama-50k", "f1", "t1")


def items(number=600):
    rng = np.random.default_rng(0)
    made = []
    for i in range(number):
        lengths = rng.integers(1, 6, 3)
        ids = [rng.integers(0, 50, n).astype(np.int32) for n in lengths]
        loss = tuple(np.ones(n, bool) for n in lengths[1:])
        made.append(Item(ids[0], np.zeros(lengths[0], bool), tuple(ids[1:]), loss, f"row {i}"))
    return made


def score(some):
    """A number that depends on the token and its place."""
    score.calls.append(len(some))
    return [np.concatenate([a * 0.01 + np.arange(len(a)) for a in i.answers]).astype(np.float32) for i in some]


@pytest.fixture(autouse=True)
def fresh():
    score.calls = []


def test_scores_stand_at_their_targets(tmp_path):
    made = with_reference(items(), MODEL, score, folder=tmp_path / "c")
    layout = collate(made[:40], pad_id=0)
    expected = np.concatenate(score(items()[:40]))
    np.testing.assert_array_equal(layout.reference.numpy(), expected)


def test_a_second_run_reads(tmp_path):
    first = with_reference(items(), MODEL, score, folder=tmp_path / "c")
    score.calls.clear()
    second = with_reference(items(), MODEL, score, folder=tmp_path / "c")
    assert score.calls == [1, 1]  # two examples are computed again to verify
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a.extra["reference"], b.extra["reference"])


def test_an_interrupted_run_goes_on(tmp_path):
    def breaks(some):
        if len(score.calls) == 2:
            raise KeyboardInterrupt
        return score(some)

    with pytest.raises(KeyboardInterrupt):
        with_reference(items(), MODEL, breaks, folder=tmp_path / "c")
    score.calls.clear()
    with_reference(items(), MODEL, score, folder=tmp_path / "c")
    assert score.calls == [1, 600 - 2 * refcache.BLOCK]  # one verified, the third block computed


def test_a_damaged_block_is_computed_again(tmp_path):
    good = with_reference(items(), MODEL, score, folder=tmp_path / "c")
    path = tmp_path / "c" / "block-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    again = with_reference(items(), MODEL, score, folder=tmp_path / "c")
    np.testing.assert_array_equal(good[300].extra["reference"], again[300].extra["reference"])


@pytest.mark.parametrize(
    ("other", "said"),
    [(Identity("lab/gpt2-1m", "f2", "t1"), "made with lab/llama-50k, not lab/gpt2-1m"), (Identity("lab/llama-50k", "f1", "t2"), "template")],
    ids=["model", "template"],
)  # fmt: skip
def test_a_cache_of_something_else_is_refused(tmp_path, other, said):
    with_reference(items(), MODEL, score, folder=tmp_path / "c")
    with pytest.raises(UsageError, match=said):
        with_reference(items(), other, score, folder=tmp_path / "c")
    with pytest.raises(UsageError, match="data"):
        with_reference(items(599), MODEL, score, folder=tmp_path / "c")


def test_weights_that_changed_are_noticed(tmp_path):
    with_reference(items(), MODEL, score, folder=tmp_path / "c")
    with pytest.raises(UsageError, match="not what the model says now"):
        with_reference(items(), MODEL, lambda some: [v + 0.5 for v in score(some)], folder=tmp_path / "c")


@pytest.mark.parametrize("number", [1, 2, 256, 257, 512, 600])
@pytest.mark.parametrize("end", [0, -1], ids=["first", "last"])
def test_the_first_and_the_last_example_are_computed_again(tmp_path, number, end):
    """Also when the last block is full, and when all examples are in one block."""
    made = items(number)
    with_reference(made, MODEL, score, folder=tmp_path / "c")

    def changed(some):
        return [v + 0.5 if i.id == made[end].id else v for i, v in zip(some, score(some), strict=True)]

    with pytest.raises(UsageError, match=f"{made[end].id}, "):
        with_reference(made, MODEL, changed, folder=tmp_path / "c")


@pytest.mark.parametrize("objective", ["dpo", "ld-dpo", "kto", "pl-dpo"])
def test_training_is_the_same(tmp_path, objective, monkeypatch):
    monkeypatch.setenv("METIER_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"p {i % 5}", "chosen": "a b " * (i % 3 + 1), "rejected": f"c {i}"} for i in range(24)]
    data.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    run = {
        "model": "lab/llama-50k", "objective": objective, "data": {"train": str(data), "eval_fraction": 0.2}, "adapter": "lora",
        "optimizer": {"adamw": {"lr": 1e-2}}, "train": {"steps": 4, "batch": 6, "micro_batch": 3},
    }  # fmt: skip
    live = train(run, out=tmp_path / "live", quiet=True)
    kept = train({**run, "reference_scores": "cached"}, out=tmp_path / "kept", quiet=True)
    named = train({**run, "reference_scores": str(tmp_path / "named")}, out=tmp_path / "again", quiet=True)
    assert live.metrics["eval_loss"] == pytest.approx(kept.metrics["eval_loss"], abs=1e-6)
    assert named.metrics["eval_loss"] == kept.metrics["eval_loss"]
    assert (tmp_path / "named" / "train" / "cache.json").is_file()
    with pytest.raises(UsageError, match="do not belong to this run"):
        train({**run, "model": "lab/gpt2-1m", "reference_scores": str(tmp_path / "named")}, out=tmp_path / "gpt", quiet=True)
    assert torch.isfinite(torch.tensor(kept.metrics["loss"]))
