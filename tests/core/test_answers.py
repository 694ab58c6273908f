"""Figures of a policy's answers and of its ranking of pairs, against numbers worked out by hand.

Bugs it is meant to catch: policy and reference exchanged, ties lost, intervals over answers instead of prompts, length bias
with the wrong sign, a model at the start that has been trained, other random numbers for the other model.
"""

import json

import numpy as np
import pytest
import torch

from metier import train
from metier.core.answers import ask, interval, judged, ranking, report
from metier.core.batch import Pairs
from metier.core.data.encode import Encoder
from metier.core.evaluate import Generate, evaluate
from metier.core.models import load


def pairs(chosen, rejected, lengths, ref=None):
    t = [torch.tensor(v, dtype=torch.float64) for v in (chosen, rejected, *lengths)]
    refs = [None, None] if ref is None else [torch.tensor(v, dtype=torch.float64) for v in ref]
    return Pairs(*t, *refs)


def test_ranking_by_hand():
    """Margins 1, -2, 0, 3 against the reference; the third answer pair is equally long."""
    found = ranking([
        pairs([2.0, 1.0], [0.0, 1.0], ([5.0, 2.0], [3.0, 4.0]), ([1.0, 1.0], [0.0, -1.0])),
        pairs([0.0, 4.0], [0.0, 0.0], ([3.0, 2.0], [3.0, 6.0]), ([0.0, 1.0], [0.0, 0.0])),
    ])  # fmt: skip
    assert found["pair accuracy"] == (1 + 0 + 0.5 + 1) / 4
    assert found["margin"] == pytest.approx((1 - 2 + 0 + 3) / 4)
    assert found["median margin"] == 0.5
    assert found["accuracy, longer chosen"] == 1.0
    assert found["accuracy, shorter chosen"] == 0.5  # margins -2 and 3
    assert found["labels prefer longer"] == pytest.approx(1 / 3)
    assert found["prefers longer"] == pytest.approx(2 / 3)  # 1 (longer chosen) and the -2 whose rejected answer is longer
    low, high = found["pair accuracy 95 %"]
    assert low < 0.625 < high


def test_interval_is_students():
    values = np.array([1.0, 2.0, 4.0])
    half = 4.302652729911275 * values.std(ddof=1) / np.sqrt(3)
    assert interval(values) == pytest.approx([7 / 3 - half, 7 / 3 + half])
    assert interval(np.array([2.0, 2.0])) == [2.0, 2.0]


@pytest.fixture(scope="module")
def bundle():
    return load("lab/llama-50k", seed=1)


def asked(bundle, **options):
    encoder = Encoder(bundle.tokenizer, max_length=64, truncate="error", on_empty="error")
    return ask(encoder, ["one two", "three", "for x in"], number=5, max_new_tokens=6, **options)


def test_a_model_against_itself(bundle):
    def judge(prompts, answers):
        assert prompts == ["one two", "three", "for x in"]
        return np.array([[float(len(a)) for a in row] for row in answers])

    others = judged(bundle, asked(bundle), judge)
    found = report(bundle, asked(bundle), reference=bundle.model, judge=judge, others=others)
    assert found["kl"] == pytest.approx(0, abs=1e-9)
    assert found["kl_mc"] == pytest.approx(0, abs=1e-9)
    assert found["win_rate"] == 0.5  # the same answers: every win has its loss
    assert found["reward"] == pytest.approx(others.mean())
    assert found["reward 95 %"] == pytest.approx(interval(others.mean(1)))
    better = report(bundle, asked(bundle), judge=judge, others=others - 100)
    assert better["win_rate"] == 1.0


def test_another_model_is_farther(bundle):
    found = report(bundle, asked(bundle), reference=load("lab/llama-50k", seed=2).model)
    assert found["kl"] > 0
    assert 0 < found["length"] <= 6


@pytest.fixture
def run(tmp_path):
    data = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"p {i}", "chosen": "good " * (i % 3 + 1), "rejected": f"bad {i}"} for i in range(30)]
    data.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    hook = {"answers": {"prompts": str(data), "limit": 3, "number": 2, "max_new_tokens": 4, "every": 2}}
    return {
        "model": "lab/llama-50k", "objective": "dpo", "data": {"train": str(data), "eval_fraction": 0.3}, "adapter": "lora",
        "optimizer": {"adamw": {"lr": 3e-2}}, "hooks": [hook], "train": {"steps": 5, "batch": 6},
    }  # fmt: skip


@pytest.mark.parametrize("adapter", ["lora", None])
def test_through_a_run_and_its_evaluation(tmp_path, run, adapter):
    done = train({**run, "adapter": adapter}, out=tmp_path / "run", quiet=True)
    steps = [e for e in done.events if e["event"] == "step"]
    assert ["answer_kl" in e for e in steps] == [False, True, False, True, True]
    assert done.metrics["answer_kl"] > 0
    assert done.metrics["answer_pair_accuracy"] > 0.9  # good against bad
    found = evaluate(tmp_path / "run", generate=Generate(prompts=3, answers=2, max_new_tokens=4))
    assert found["pair accuracy"] == pytest.approx(found["accuracy"], abs=1e-6)
    assert found["answer kl"] > 0
    assert found["answer length"] <= 4


def test_before_training_there_is_no_distance(tmp_path, run):
    run["hooks"][0]["answers"]["every"] = 1
    done = train({**run, "optimizer": {"adamw": {"lr": 1e-12}}, "train": {**run["train"], "steps": 1}}, out=tmp_path / "r", quiet=True)
    assert done.metrics["answer_kl"] == pytest.approx(0, abs=1e-6)
