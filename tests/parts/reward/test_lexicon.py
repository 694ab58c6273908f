"""Oracle of reward/lexicon: words counted by hand, the lab's own lexicon reward, and VADER called directly.

Bugs it is meant to catch: distinct words instead of occurrences, parts of words, division by the words of the list instead of the
answer, 0/0 of an empty answer.
"""

import builtins
import random

import pytest

from metier.core import part
from metier.core.errors import UsageError
from metier.lab import words
from metier.testing import check_part

LISTS = {"good": ["Good", "well-made"], "bad": ["bad"]}


def reward(**options):
    return part.build("reward", {"lexicon": options}).obj


def test_contract():
    check_part("reward/lexicon")


def test_by_hand():
    texts = [["Good, GOOD bad!", "goodness", "", "a well-made thing", "bad " * 4]]
    assert reward(**LISTS, per="count")(["p"], texts, None).tolist() == [[1, 0, 0, 1, -4]]
    assert reward(**LISTS)(["p"], texts, None).tolist() == [pytest.approx([1 / 3, 0, 0, 1 / 3, -1])]


def test_it_is_the_labs_reward_up_to_repetitions():
    good, bad = ([w for pair in table for w in pair] for table in (words.GOOD, words.BAD))
    rng = random.Random(0)
    prompts = words.prompts(200, 0)
    answers = [words.answer(p, rng) for p in prompts]
    kept = [
        (p, a)
        for p, a in zip(prompts, answers, strict=True)
        if len(set(a.split()) & set(good)) == sum(w in good for w in a.split())
    ]
    got = reward(good=good, bad=bad, per="count")([p for p, _ in kept], [[a] for _, a in kept], None)
    assert len(kept) > 100
    assert got[:, 0].tolist() == [words.lexicon_count(p, a) for p, a in kept]


def test_vader():
    sentiment = pytest.importorskip("vaderSentiment.vaderSentiment").SentimentIntensityAnalyzer()
    texts = ["This is GREAT!!!", "It is not good.", "A table.", "", "horrible, just horrible"]
    got = reward(vader=True)(["p"], [texts], None)[0].tolist()
    assert got == pytest.approx([sentiment.polarity_scores(t)["compound"] if t else 0 for t in texts])
    assert got[0] > 0.6
    assert got[1] < 0
    assert got[4] < -0.5


def test_without_the_package(monkeypatch):
    from metier.parts.reward import lexicon

    real = builtins.__import__

    def absent(name, *args, **kwargs):
        if name.startswith("vaderSentiment"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    lexicon._vader.cache_clear()
    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(UsageError, match="needs the package vaderSentiment"):
        reward(vader=True)(["p"], [["text"]], None)


def test_refusals():
    with pytest.raises(UsageError, match="either lists"):
        reward()(["p"], [["x"]], None)
    with pytest.raises(UsageError, match="either lists"):
        reward(vader=True, **LISTS)(["p"], [["x"]], None)
    with pytest.raises(UsageError, match="not one word"):
        reward(good=["very good"])(["p"], [["x"]], None)
    with pytest.raises(UsageError, match="in both lists"):
        reward(good=["x"], bad=["X"])(["p"], [["x"]], None)


def test_ragged():
    assert reward(**LISTS)(["p", "q"], [["good"], ["bad", "good"]], None).tolist() == [[1, 0], [-1, 1]]
