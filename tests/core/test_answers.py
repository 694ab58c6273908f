"""Figures of a policy's answers and of its ranking of pairs, against numbers worked out by hand.

Bugs it is meant to catch: policy and reference exchanged, ties lost, intervals over answers instead of prompts, length bias
with the wrong sign, a model at the start that has been trained, other random numbers for the other model.
"""

import numpy as np
import pytest
import torch

from metier.core.answers import as_judge, ask, judged, ranking, report
from metier.core.batch import Pairs
from metier.core.data.encode import Encoder
from metier.core.data.examples import Message, Prompted
from metier.core.intervals import student, wilson
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
    assert found["pair accuracy 95 %"] == list(wilson(2.5, 4))


@pytest.fixture(scope="module")
def bundle():
    return load("lab/llama-50k", seed=1)


def asked(bundle, **options):
    encoder = Encoder(bundle.tokenizer, max_length=64, truncate="error", on_empty="error")
    return ask(encoder, [Prompted(p) for p in ("one two", "three", "for x in", "three")], number=5, max_new_tokens=6, **options)


def test_a_model_against_itself(bundle):
    def judge(prompts, answers, known):
        assert prompts == ["one two", "three", "for x in"]
        assert known is None
        return np.array([[float(len(a)) for a in row] for row in answers])

    others = judged(bundle, asked(bundle), judge)
    found = report(bundle, asked(bundle), reference=bundle.model, judge=judge, others=others)
    assert found["kl"] == pytest.approx(0, abs=1e-9)
    assert found["kl_mc"] == pytest.approx(0, abs=1e-9)
    assert found["win_rate"] == 0.5  # the same answers: every win has its loss
    assert found["reward"] == pytest.approx(others.mean())
    assert found["reward 95 %"] == pytest.approx(list(student(others.mean(1))))
    better = report(bundle, asked(bundle), judge=judge, others=others - 100)
    assert better["win_rate"] == 1.0


def test_another_model_is_farther(bundle):
    found = report(bundle, asked(bundle), reference=load("lab/llama-50k", seed=2).model)
    assert found["kl"] > 0
    assert 0 < found["length"] <= 6


class Talked:
    takes_messages = True

    def __call__(self, prompts, completions, answers):
        assert prompts == [CHAT]
        assert answers == ["4"]
        return torch.tensor([[float(len(c)) for c in completions[0]]])


CHAT = (Message("system", "be brief"), Message("user", "2 + 2"))


def test_a_reward_gets_conversations_and_right_answers(bundle):
    encoder = Encoder(bundle.tokenizer, max_length=64, truncate="error", on_empty="error")
    examples = [Prompted(CHAT, meta={"answer": 4}), Prompted(CHAT, meta={"answer": 5}), Prompted("other")]
    made = ask(encoder, examples, limit=1, number=2, max_new_tokens=3)
    assert made.prompts == [CHAT]
    assert judged(bundle, made, as_judge(Talked())).shape == (1, 2)
    assert ask(encoder, examples).known is None  # not all have one


def test_a_reward_without_conversations_reads_their_text():
    seen = []
    judge = as_judge(lambda prompts, completions, answers: seen.append(prompts) or torch.zeros(1, 1))
    judge([CHAT], [["x"]], None)
    assert seen == [["be brief\n\n2 + 2"]]
