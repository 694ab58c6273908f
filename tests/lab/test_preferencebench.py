"""The word language, its data, its model and its measures; and that preferences learnt through the engine raise the gold reward.

Bugs it is meant to catch: labels that do not follow the stated probabilities, held-out prompts in training, a measure of other answers
than those that were sampled, a reference that is not the start.
"""

import math
import random

import numpy as np
import pytest

from metier.core import models
from metier.core.data.formats import examples
from metier.core.data.rows import open_rows
from metier.core.errors import UsageError
from metier.lab import preferencebench as bench
from metier.lab import tasks, wordmodel, wordpairs, words, zoo


def drawn(number, seed=0, **how):
    rng = random.Random(seed)
    asked = words.prompts(number, seed, **how)
    return [(p, words.answer(p, rng)) for p in asked]


def test_every_word_is_one_token_and_texts_survive():
    tokenizer = wordmodel.word_tokenizer()
    assert 64 <= len(tokenizer) == len(words.vocabulary()) <= 512
    for p, a in drawn(300, split="any", constrained=3):
        for text in (p, a):
            ids = tokenizer(text)["input_ids"]
            assert len(ids) == len(text.split())
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids, skip_special_tokens=True) == text
        assert 3 <= len(a.split()) <= words.LONGEST


def test_splits_do_not_overlap():
    train, held_out, shifted = (set(words.prompts(4000, 1, split=s)) for s in ("train", "held-out", "shifted"))
    assert not train & held_out
    assert {words.topic(p) for p in shifted} == set(words.SHIFTED)
    assert not {words.topic(p) for p in train | held_out} & set(words.SHIFTED)
    assert words.prompts(20, 5) == words.prompts(20, 5) != words.prompts(20, 6)
    with pytest.raises(UsageError, match="praise"):
        words.prompts(1, classes=("prase",))


def test_gold_rewards_by_hand():
    p = "praise fox today ?"
    assert words.lexicon_count(p, "fox is kind it is kind it is dull") == 0  # one distinct good, one bad
    assert words.lexicon(p, "fox is kind") == 1
    assert words.lexicon(p, "fox is kind it is red") == 0.5
    assert words.lexicon(p, "kind") == 1
    assert words.lexicon(p, "dull dull dull") == -3
    assert words.lexicon(p, "kind kind kind kind kind kind") == 0.5
    assert words.lexicon(p, "") == words.quality(p, "") == 0
    assert words.quality(p, "fox is kind surely it is dull") == 0
    assert words.quality(p, "kind kind dull") == -1  # praise outside a clause is none, abuse is abuse
    assert words.quality(p, "owl is kind") == words.quality(p, "fox kind is") == words.quality(p, "is kind") == 0
    assert words.quality(p, "owl fox is kind bold fox") == 0.5
    assert all(words.quality(*x) == words.lexicon(*x) for x in drawn(2000))
    assert words.attributes("please fox is kind frankly it is red surely it is red") == (0, 1, 0, 0)
    assert words.attribute_reward(p, "please fox is kind therefore it is red") == 0.5
    assert words.followed("praise fox today bluntly ?", "frankly fox is kind") == 1
    assert words.followed("praise fox today politely ?", "frankly fox is kind") == -1
    assert words.degenerate("kind kind kind kind fox")
    assert words.degenerate("")
    assert not words.degenerate("fox is kind it is red")
    with pytest.raises(UsageError, match="lexicon"):
        words.gold("lexikon")


@pytest.mark.parametrize(
    ("asked", "answer", "held"),
    [
        ("with kind", "fox is kind", True), ("with kind", "fox is red", False), ("without is", "fox is red", False),
        ("without is", "fox seems red", True), ("begin surely", "surely fox is red", True),
        ("begin surely", "fox is red surely", False), ("finish red", "fox is red", True), ("finish red", "red fox", False),
        ("order kind then red", "fox is kind it is red", True), ("order kind then red", "fox is red it is kind", False),
        ("clauses two", "fox is red it is red", True), ("clauses two", "fox is red", False),
    ],
)  # fmt: skip
def test_constraints(asked, answer, held):
    p = f"praise fox today {asked} with fox ?"
    assert words.satisfied(p, answer) == [held, True]
    assert words.constraint_reward(p, answer) == (1.0 if held else 0.5)


def test_the_mixture_is_what_it_says():
    """Classes differ in gold, control words are followed six times in ten, constraints hold four times in ten."""
    gold = {c: np.mean([words.lexicon(*x) for x in drawn(1500, classes=(c,))]) for c in words.CLASSES}
    assert gold[words.EASY] > 0.35 > 0.1 > abs(gold["describe"])
    assert gold[words.HARD] < -0.15
    shown = [f for x in drawn(4000, control=1.0) if (f := words.followed(*x))]
    assert np.mean(np.array(shown) > 0) == pytest.approx(0.6, abs=0.03)
    held = [h for row in wordpairs.mixture(4000) for h in words.satisfied(row["prompt"], row["completion"])]
    assert np.mean(held) == pytest.approx(0.4, abs=0.06)
    assert np.mean([words.degenerate(a) for _, a in drawn(2000)]) < 0.05
    rng = random.Random(0)
    a = {w for p in words.prompts(200) for w in words.answer(p, rng, synonyms=1.0).split()}
    b = {w for p in words.prompts(200) for w in words.answer(p, rng, synonyms=0.0).split()}
    assert not (a & b) - {*words.VERBS, *words.PRONOUNS, *words.TOPICS}


def test_labels_are_bradley_terry_draws():
    a, b, rng = "fox is kind", "fox is red", random.Random(1)
    for temperature, flip, bonus, b2 in (
        (0.5, 0.0, 0.0, b),
        (0.5, 0.3, 0.0, b),
        (1.0, 0.0, 0.2, f"{b} it is red"),
        (0.0, 0.0, 0.0, b),
    ):
        rows = [
            wordpairs.label("praise fox today ?", a, b2, rng, temperature=temperature, flip=flip, length_bonus=bonus)
            for _ in range(4000)
        ]
        gap = 1.0 - bonus * (len(b2.split()) - 3)
        p = 1 / (1 + math.exp(-gap / temperature)) if temperature else 1.0
        p = (1 - flip) * p + flip * (1 - p)
        seen = np.mean([r["chosen"] == a for r in rows])
        assert abs(seen - p) <= 4 * math.sqrt(p * (1 - p) / 4000)
        assert all(r["score_chosen"] > r["score_rejected"] for r in rows)
        assert all((r["gold_chosen"], r["gold_rejected"]) == ((1, 0) if r["chosen"] == a else (0, 1)) for r in rows)
        assert np.mean([r["flipped"] for r in rows]) == pytest.approx(flip, abs=0.03)


def edits(a, b):
    a, b = a.split(), b.split()
    return math.inf if len(a) != len(b) else sum(x != y for x, y in zip(a, b, strict=True))


def test_kinds_of_pairs():
    near = wordpairs.pairs(300, near_share=1.0)
    assert {edits(r["chosen"], r["rejected"]) for r in near} == {1, 2}
    for r in wordpairs.pairs(200, prefix_share=1.0):
        a, b = r["chosen"].split(), r["rejected"].split()
        shared = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        assert shared >= 0.6 * min(len(a), len(b)) - 1
    long = tasks.preferences_long()
    sizes = [len(r["chosen"].split()) - len(r["rejected"].split()) for r in long]
    assert np.mean([s > 0 for s in sizes]) == pytest.approx(0.7, abs=0.03)
    rows = wordpairs.unpaired(wordpairs.pairs(1000), keep_desirable=0.1)
    assert sum(r["label"] for r in rows) == pytest.approx(100, abs=40)
    assert sum(not r["label"] for r in rows) == 1000


@pytest.mark.parametrize(
    ("name", "kind", "number"),
    [
        ("preferences", "Preference", 4000), ("preferences-flipped", "Preference", 4000), ("preferences-long", "Preference", 4000),
        ("preferences-held-out", "Preference", 1000), ("preferences-unpaired", "Judged", 4000), ("preference-lists", "Ranked", 1500),
    ],
)  # fmt: skip
def test_data_for_run_files(name, kind, number):
    found = examples(open_rows(f"lab/{name}"))
    assert len(found) == number
    assert {type(e).__name__ for e in found} == {kind}
    assert tasks.TASKS[name]() == tasks.TASKS[name]()
    if kind == "Preference":
        assert all(e.margin > 0 for e in found)


@pytest.fixture(scope="module")
def sft():
    """The cached model; trained in half a minute where the cache is new."""
    return bench.sft()


def test_the_model_loads_by_name_with_its_weights(sft):
    a, b = models.load("lab/words-sft", seed=1), models.load("lab/words-sft", seed=2)
    assert a.fingerprint == b.fingerprint == sft.fingerprint != models.load("lab/words-120k").fingerprint
    assert models.tokenizer_of("lab/words-sft").get_vocab() == a.tokenizer.get_vocab()
    classifier = models.load("lab/words-sft", task="classify", num_labels=1)
    for (n, p), (m, q) in zip(
        models.backbone(classifier.model).named_parameters(), models.backbone(a.model).named_parameters(), strict=True
    ):
        assert n == m
        assert (p == q).all()
    with pytest.raises(UsageError, match="lab/words-sft"):
        zoo.check("lab/words-sff")


def test_the_model_answers_as_its_data(sft):
    found = bench.measure(sft, sft, words.prompts(256, 1), samples=1024)
    data = drawn(4000)
    assert found["gold_reward"] == pytest.approx(np.mean([words.lexicon(*x) for x in data]), abs=0.08)
    assert found["length"] == pytest.approx(np.mean([len(a.split()) + 1 for _, a in data]), abs=1.0)
    assert found["kl"] == found["kl_mc"] == 0
    assert found["ended"] > 0.99
    assert found["degenerate"] < 0.03
    assert 0.1 < found["followed"] < 0.35
    assert found == bench.measure(sft, sft, words.prompts(256, 1), samples=1024)


def test_drawing_pairs_from_the_model(sft):
    rows = bench.sampled_pairs(sft, 100, seed=3, flip=0.2)
    assert 80 <= len(rows) <= 100
    assert {r["prompt"] for r in rows} <= set(words.prompts(100, "sampled 3"))
    assert rows == bench.sampled_pairs(sft, 100, seed=3, flip=0.2)
    more = wordpairs.pairs(10, answers=bench.answerer(sft))
    assert len({r["chosen"] for r in more}) == 10


def test_measures_of_pairs_by_hand(sft):
    """Summed log-ratios from whole-sequence forward passes in float64."""
    other = models.load("lab/words-120k", seed=4)
    rows = wordpairs.pairs(6, seed=5)
    found = bench.measure_pairs(other, sft, rows)
    ratio = {
        key: np.array([logp(other.model, r["prompt"], r[key]) - logp(sft.model, r["prompt"], r[key]) for r in rows])
        for key in ("chosen", "rejected")
    }
    margin = ratio["chosen"] - ratio["rejected"]
    assert found["chosen_change"] == pytest.approx(ratio["chosen"].mean(), rel=1e-4)
    assert found["rejected_change"] == pytest.approx(ratio["rejected"].mean(), rel=1e-4)
    assert found["margin"] == pytest.approx(margin.mean(), rel=1e-3)
    assert found["accuracy"] == np.mean(margin > 0)
    sign = np.array([np.sign(r["gold_chosen"] - r["gold_rejected"]) for r in rows])
    assert found["gold_accuracy"] == np.mean((margin * sign > 0)[sign != 0])


def logp(model, prompt, answer):
    import torch

    (p,), (a,) = bench.encode([prompt]), bench.encode([answer], end=True)
    with torch.no_grad():
        z = model(input_ids=torch.tensor(np.concatenate([p, a]).astype(np.int64))[None]).logits[0, len(p) - 1 : -1]
    return float(z.double().log_softmax(-1)[torch.arange(len(a)), torch.tensor(a.astype(np.int64))].sum())


def test_dpo_through_the_engine_raises_the_gold_reward(sft, tmp_path):
    rows = wordpairs.pairs(800, seed=1)
    held_out = wordpairs.pairs(300, split="held-out")
    tuned, found = bench.train(
        {"dpo": {"beta": 0.1}}, rows, lr=1e-3, steps=50, folder=tmp_path, batch=16, samples=256, held_out=held_out
    )
    before = bench.measure(sft, sft, words.prompts(128, "measured", split="held-out"), samples=256)
    assert found["gold_reward"] > before["gold_reward"] + 0.3 * before["gold_sd"]
    assert 0.2 < found["kl"] < 15
    assert abs(found["kl"] - found["kl_mc"]) < 0.25 * found["kl"] + 0.3
    assert found["gold_accuracy"] > 0.7
    assert found["chosen_change"] > found["rejected_change"]
    assert found["steps"] == 50
    assert tuned.tokenizer.get_vocab() == sft.tokenizer.get_vocab()
    again, same = bench.train(
        {"dpo": {"beta": 0.1}}, rows, lr=1e-3, steps=50, folder=tmp_path, batch=16, samples=256, held_out=held_out
    )
    assert again.fingerprint == tuned.fingerprint
    assert same["gold_reward"] == found["gold_reward"]
