"""``plan`` says before a run what it will train on and hold in memory, from one real step, and leaves nothing behind."""

import json
import random
import re

import numpy as np
import pytest
import torch

from metier.core import models
from metier.core.api import train
from metier.core.errors import UsageError
from metier.core.plan import plan

WORDS = ("print", "statement", "python", "module", "returns", "values", "for", "every", "object", "error")


def text_rows(lengths):
    rng = random.Random(0)
    return [{"text": f"{i} " + " ".join(rng.choices(WORDS, k=n))} for i, n in enumerate(lengths)]


def settings(tmp_path, rows, **changes):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    run = {
        "model": "lab/llama-50k",
        "data": {"train": str(path), "max_length": 128},
        "optimizer": {"adamw": {"lr": 1e-2}},
        "train": {"steps": 3, "batch": 2},
    }
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(run.get(key), dict) and key in ("data", "train"):
            run[key] = {**run[key], **value}
        else:
            run[key] = value
    return run


def parameters(name="lab/llama-50k"):
    return sum(p.numel() for p in models.load(name).model.parameters())


# --- memory ---------------------------------------------------------------------------------------------------


def test_weights_gradients_and_optimizer_state_are_exact(tmp_path):
    n = parameters()
    memory = plan(settings(tmp_path, text_rows([5] * 6)))["memory"]
    assert memory["parameters"] == memory["trainable"] == n
    assert memory["weights"] == memory["gradients"] == 4 * n
    assert memory["optimizer state"] == 2 * 4 * n
    assert memory["peak measured"] > memory["weights"] + memory["gradients"] + memory["optimizer state"]


def test_frozen_and_low_precision_parameters_count_for_what_they_are(tmp_path):
    adapter = {"lora": {"rank": 2, "targets": "*q_proj"}}
    run = settings(tmp_path, text_rows([5] * 6), adapter=adapter, dtype="bf16", optimizer={"sgd-momentum": {"lr": 0.1}})
    memory = plan(run)["memory"]
    factors = 2 * (2 * 16 + 2 * 16)  # two blocks; A [2, 16] and B [16, 2]
    assert memory["trainable"] == factors
    assert memory["parameters"] == parameters() + factors
    size = memory["gradients"] // factors
    assert size in (2, 4)
    assert memory["weights"] == 2 * parameters() + size * factors
    assert memory["optimizer state"] == 4 * factors


def test_activations_are_estimated_for_the_widest_micro_batch(tmp_path):
    run = settings(tmp_path, text_rows([3, 3, 3, 60]), train={"micro_batch": 1})
    small = plan(run, step=False)["memory"]["activations, estimated"]
    both = plan(run, ["train.micro_batch=2"], step=False)["memory"]["activations, estimated"]
    assert both == 2 * small  # the longest example and one padded to it


# --- data -----------------------------------------------------------------------------------------------------


def test_the_preview_marks_exactly_the_tokens_that_carry_loss(tmp_path):
    chat = {
        "messages": [
            {"role": "user", "content": "name a fruit"}, {"role": "assistant", "content": "an apple"},
            {"role": "user", "content": "and a tree"}, {"role": "assistant", "content": "a pine"},
        ]
    }  # fmt: skip
    found = plan(settings(tmp_path, [chat] * 4), step=False)
    (branch,) = found["preview"][0]["branches"]
    assert [s["text"] for s in branch if s["loss"]] == ["an apple<|im_end|>", "a pine<|im_end|>"]
    tokenizer = models.tokenizer_of("lab/llama-50k")
    assert "".join(s["text"] for s in branch) == tokenizer.apply_chat_template(chat["messages"], tokenize=False)
    ids = [len(tokenizer.encode(s["text"], add_special_tokens=False)) for s in branch if s["loss"]]
    assert found["preview"][0]["targets"] == sum(ids)
    marked = re.findall("⟦(.*?)⟧", found["preview_text"][0], re.DOTALL)
    assert marked == ["an apple<|im_end|>", "a pine<|im_end|>"]


def test_the_first_token_of_a_text_has_nothing_that_predicts_it(tmp_path):
    tokenizer = models.tokenizer_of("lab/llama-50k")
    item = plan(settings(tmp_path, text_rows([5] * 4)), step=False)["preview"][0]
    ((first, rest),) = item["branches"]
    assert (first["loss"], rest["loss"]) == (False, True)
    assert len(tokenizer.encode(first["text"])) == 1
    assert item["targets"] == item["tokens"] - 1


def test_the_preview_of_a_pair_has_a_branch_for_each_answer(tmp_path):
    pair = {"prompt": "name a fruit", "chosen": "apple", "rejected": "stone"}
    run = settings(tmp_path, [pair] * 4, objective="dpo", adapter={"lora": {"rank": 2}})
    prompt, chosen, rejected = plan(run, step=False)["preview"][0]["branches"]
    assert not any(s["loss"] for s in prompt)
    assert "".join(s["text"] for s in chosen if s["loss"]).startswith("apple")
    assert "".join(s["text"] for s in rejected if s["loss"]).startswith("stone")


def test_lengths_and_counts_are_those_of_the_data(tmp_path):
    lengths = [2, 9, 30, 4, 17]
    rows = text_rows(lengths)
    tokenizer = models.tokenizer_of("lab/llama-50k")
    real = sorted(len(tokenizer.encode(r["text"])) for r in rows)
    data = plan(settings(tmp_path, rows, train={"steps": None, "epochs": 2}), step=False)["data"]
    assert data["examples"] == 5
    assert data["steps"] == 5
    ends = data["length"]["longest"] - real[-1]
    assert ends in (0, 1)  # an end-of-text token
    assert data["length"] == {"shortest": real[0] + ends, "median": real[2] + ends, "longest": real[-1] + ends}
    total = sum(real) + 5 * ends
    assert data["tokens with loss"] == pytest.approx((total - 5) / total)


def test_nothing_but_json(tmp_path):
    found = plan(settings(tmp_path, text_rows([4] * 6), hooks=["ema"], data={"eval_fraction": 0.3}))
    assert json.loads(json.dumps(found, allow_nan=False)) == json.loads(json.dumps(found))
    assert found["data"]["held out"] == 2
    assert {"objective/lm", "optimizer/adamw", "schedule/cosine", "hook/ema"} == set(found["parts"])


# --- the step -------------------------------------------------------------------------------------------------


def test_the_first_step_holds_the_longest_examples_and_is_not_the_only_one(tmp_path, monkeypatch):
    from metier.core.loop import Loop

    seen = []
    real = Loop._gradient_step

    def spy(self, batch):
        seen.append(batch.ids)
        return real(self, batch)

    monkeypatch.setattr(Loop, "_gradient_step", spy)
    time = plan(settings(tmp_path, text_rows([3, 50, 4, 40, 5, 6])))["time"]
    assert {i.rsplit(":", 1)[1] for i in seen[0]} == {"2", "4"}
    assert len(seen) == 3
    assert time["whole run"] == pytest.approx(3 * time["typical step"])


def test_a_run_of_a_single_step_and_hooks_that_begin_with_the_run(tmp_path):
    found = plan(settings(tmp_path, text_rows([4] * 6), hooks=["neftune", "ema"], schedule="linear", train={"steps": 1}))
    assert found["data"]["steps"] == 1
    assert found["time"]["worst step"] > 0


def test_nothing_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "aside"))
    (tmp_path / "aside").mkdir()
    monkeypatch.setattr("tempfile.tempdir", None)
    run = settings(tmp_path, text_rows([4] * 6), out="kept", adapter={"lora": {"rank": 2}})
    before = sorted(p for p in tmp_path.rglob("*"))
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    plan(run)
    assert sorted(p for p in tmp_path.rglob("*")) == before
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])


# --- refusals -------------------------------------------------------------------------------------------------


@pytest.fixture
def no_models(monkeypatch):
    def load(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(models, "load", load)


WRONG = {
    "unknown key": ({"optimiser": "lion"}, []),
    "unknown option": ({"optimizer": {"adamw": {"betaa1": 0.9}}}, []),
    "unknown part": ({"optimizer": "adamv"}, []),
    "unknown model": ({"model": "lab/lama-50k"}, []),
    "missing file": ({"data": {"train": "none.jsonl"}}, []),
    "two lengths": ({"train": {"epochs": 1}}, []),
    "bad override": ({}, ["train.steps"]),
    "wrong type": ({}, ["train.steps=many"]),
    "objective of other data": ({"objective": "dpo"}, []),
}


@pytest.mark.parametrize("case", WRONG)
def test_plan_refuses_what_train_refuses_before_a_model_is_loaded(tmp_path, no_models, case):
    changes, overrides = WRONG[case]
    run = settings(tmp_path, text_rows([4] * 6), **changes)
    said = []
    for attempt in (lambda: plan(run, overrides), lambda: train(run, overrides, out=tmp_path / "run", quiet=True)):
        with pytest.raises(UsageError) as e:
            attempt()
        said.append(str(e.value))
    assert said[0] == said[1]


def test_data_without_any_loss_are_refused(tmp_path, no_models):
    rows = [{"prompt": "name a fruit " * 20, "completion": "apple"}] * 4
    run = settings(tmp_path, rows, data={"max_length": 8, "truncate": "right"})
    for refused in (plan, lambda r: train(r, out=tmp_path / "run", quiet=True)):
        with pytest.raises(UsageError, match=r"no example is left to train on .*4 .*loss"):
            refused(run)
