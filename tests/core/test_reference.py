"""The reference of a run is its model at the start, model parts included.

Bugs it is meant to catch: a reference without the run's transforms, transforms with other random numbers than the model's,
kept scores of the model without (or with other) transforms.
"""

import json
import math

import pytest
import torch

from metier import train
from metier.core import config
from metier.core.answers import at_start
from metier.core.session import open_session

CHANGED = [{"layer-scale": {"init": 0.3}}]
DRAWN = ["mla"]
"""Its new weights are random."""


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("METIER_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"p {i % 5}", "chosen": "a b " * (i % 3 + 1), "rejected": f"c {i}"} for i in range(12)]
    data.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return {
        "model": "lab/llama-50k", "objective": "dpo", "data": {"train": str(data), "eval_fraction": 0.2}, "schedule": "constant",
        "optimizer": {"adamw": {"lr": 1e-2}}, "train": {"steps": 2, "batch": 6, "seed": 3},
    }  # fmt: skip


def losses(result):
    return [e["loss"] for e in result.events if e["event"] == "step"]


@pytest.mark.parametrize("adapter", [None, "lora"])
@pytest.mark.parametrize("transform", [[], CHANGED, DRAWN], ids=["plain", "changed", "drawn"])
@pytest.mark.parametrize("scores", ["live", "cached"])
def test_the_first_loss_is_that_of_equal_models(tmp_path, run, transform, adapter, scores):
    made = train({**run, "transform": transform, "adapter": adapter, "reference_scores": scores}, out=tmp_path / "r", quiet=True)
    assert losses(made)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses(made)[1] != losses(made)[0]


@pytest.mark.parametrize("adapter", [None, "lora"])
def test_kept_scores_are_of_these_transforms(tmp_path, run, adapter):
    """One cache for all: each run finds its own scores, and so its first loss is that of equal models."""
    for i, transform in enumerate(([], CHANGED, [{"layer-scale": {"init": 0.5}}], CHANGED, DRAWN)):
        own = {**run, "transform": transform, "adapter": adapter, "reference_scores": "cached"}
        made = train(own, out=tmp_path / f"run{i}", quiet=True)
        assert losses(made)[0] == pytest.approx(math.log(2), abs=1e-6)
    folders = {p.parent for p in (tmp_path / "cache").rglob("cache.json")}
    assert len(folders) == 2 * 4, "of training and held-out items; equal transforms share theirs"


def test_kept_scores_are_of_these_random_weights(tmp_path, run):
    """A model on disk is the same with every seed, what a transform draws for it is not."""
    own = {**run, "model": "lab/words-sft", "data": {"train": "lab/preferences", "limit": 12}, "transform": DRAWN}
    for seed in (3, 4):
        given = {**own, "reference_scores": "cached", "train": {**run["train"], "seed": seed}}
        assert losses(train(given, out=tmp_path / f"r{seed}", quiet=True))[0] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("transform", [[], CHANGED, DRAWN], ids=["plain", "changed", "drawn"])
def test_answers_are_compared_with_the_model_at_the_start(tmp_path, run, transform):
    ids = torch.arange(8)[None] + 5
    with open_session(*config.load({**run, "transform": transform}, []), tmp_path / "r", quiet=True, handle_signals=False) as s:
        model = s.context.bundle.model.eval()
        with torch.no_grad():
            before = model(ids).logits
            for p in model.parameters():
                p.add_(0.01)
            reference, bundle, _ = at_start(s.context)
            assert bundle.model is reference
            torch.testing.assert_close(reference(ids).logits, before, rtol=0, atol=1e-6)
            assert not torch.allclose(model(ids).logits, before, atol=1e-3)
