"""Oracle of reward/reward-model: transformers' own classifier on one padded-free sequence at a time; and a run trained here.

Bugs it is meant to catch: the head read at another token than the last, answers that see each other, prompts without their
template, the base of an adapter instead of the tuned model.
"""

import json
import random

import pytest
import torch
import transformers

from metier import train
from metier.core import models, part
from metier.core.data.examples import Message
from metier.core.errors import UsageError
from metier.lab import wordpairs, words
from metier.testing import check_part

PROMPTS = ["describe fox today ?", "review owl here ?"]
ANSWERS = [
    ["fox is lovely", "it looks dull", "fox is lovely it seems kind this is ugly"],
    ["owl is ugly", "this is calm", "it is red"],
]


def reward(model, **options):
    return part.build("reward", {"reward-model": {"model": str(model), "device": "cpu", **options}}).obj


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rm")
    data = folder / "pairs.jsonl"
    data.write_text("".join(json.dumps(r) + "\n" for r in wordpairs.pairs(600, 0, temperature=0)))
    train(
        {"model": "lab/words-sft", "data": {"train": str(data), "max_length": 64}, "objective": "bradley-terry",
         "optimizer": {"adamw": {"lr": 3e-3}}, "train": {"steps": 60, "batch": 16}},
        out=folder / "run", quiet=True, handle_signals=False,
    )  # fmt: skip
    return folder / "run"


def test_contract():
    check_part("reward/reward-model")


def test_a_run_by_transformers_own_classifier(run):
    model = transformers.AutoModelForSequenceClassification.from_pretrained(run / "model").eval()
    tokenizer = models.tokenizer_of("lab/words-sft")
    got = reward(run)(PROMPTS, ANSWERS, None)
    for i, prompt in enumerate(PROMPTS):
        for k, answer in enumerate(ANSWERS[i]):
            ids = tokenizer(f"{prompt} {answer}", add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
            with torch.no_grad():
                hidden = model.model(torch.tensor([ids])).last_hidden_state[0, -1]
                expected = model.score(hidden).item()
            assert got[i, k].item() == pytest.approx(expected, abs=1e-4)


def test_a_trained_one_knows_good_answers(run):
    rng = random.Random(5)
    prompts = words.prompts(60, "t", split="held-out")
    answers = [[words.answer(p, rng) for _ in range(4)] for p in prompts]
    got = reward(run)(prompts, answers, None)
    gold = torch.tensor([[words.lexicon(p, a) for a in row] for p, row in zip(prompts, answers, strict=True)])
    assert torch.corrcoef(torch.stack([got.flatten(), gold.flatten()]))[0, 1] > 0.6


def test_the_folder_of_its_model_is_the_same(run):
    assert torch.allclose(reward(run / "model")(PROMPTS, ANSWERS, None), reward(run)(PROMPTS, ANSWERS, None))


def test_each_answer_on_its_own_and_ragged(run):
    whole = reward(run)(PROMPTS, ANSWERS, None)
    got = reward(run)(PROMPTS, [ANSWERS[0][:1], ANSWERS[1]], None)
    assert torch.allclose(got[0, :1], whole[0, :1], atol=1e-5)
    assert got[0, 1:].tolist() == [0, 0]
    assert torch.allclose(got[1], whole[1], atol=1e-5)
    assert reward(run)(["p"], [[]], None).shape == (1, 0)


def test_conversations_need_a_template(run):
    with pytest.raises(UsageError, match="template"):
        reward(run)([(Message("user", "a"),)], [["b"]], None)


def test_other_models_are_refused(run):
    with pytest.raises(UsageError, match="lab model"):
        reward("lab/no-such")(["p"], [["a"]], None)
    with pytest.raises(UsageError, match="does not write text"):
        part.build("reward", {"judge": {"model": str(run), "device": "cpu"}}).obj(["p"], [["a"]], None)


def test_a_language_models_run_is_no_reward_model(tmp_path):
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(r) + "\n" for r in wordpairs.pairs(8, 0)))
    run = {
        "model": "lab/words-120k",
        "data": {"train": str(data), "max_length": 64},
        "objective": "dpo",
        "train": {"steps": 1, "batch": 4},
    }
    train(run, out=tmp_path / "run", quiet=True, handle_signals=False)
    with pytest.raises(UsageError, match="is no reward model"):
        reward(tmp_path / "run")(["p"], [["a"]], None)
