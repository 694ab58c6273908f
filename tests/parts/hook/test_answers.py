"""hook/answers: figures of held-out answers become metrics of the steps asked for; the start is the untrained model.

Bugs it is meant to catch: measured at other steps, a reference that is the trained model, pairs ranked the wrong way round, other
figures than ``metier eval`` gives afterwards.
"""

import json

import pytest

from metier import train
from metier.core.evaluate import Generate, evaluate


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
    run = {**run, "optimizer": {"adamw": {"lr": 1e-12}}, "train": {**run["train"], "steps": 1}}
    done = train(run, out=tmp_path / "r", quiet=True)
    assert done.metrics["answer_kl"] == pytest.approx(0, abs=1e-6)
