"""Oracle of source/ssrm: a reward that is known exactly, loops in plain Python, and whole runs with the engine.

Bugs it is meant to catch: the row's order kept where the model prefers the other answer, selection from what is left instead
of the whole pool, labelled pairs missing in later rounds, margins of some pairs only, labels from the first weights for ever.
"""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from metier.core import models, part
from metier.core.api import train
from metier.core.data.collate import collate
from metier.core.data.encode import Encoder
from metier.core.data.examples import Preference, Ranked
from metier.core.errors import UsageError
from metier.core.scores import answer_rewards
from metier.core.trained import open_run
from metier.lab import wordpairs
from metier.parts.source import _pairwise as pairwise
from metier.parts.source._pseudo import calibration_error, pseudo_labelled, report, selected
from metier.testing import check_part


def ssrm(**options):
    return part.build("source", {"ssrm": options}).obj


def length_policy(tmp_path, scale=1.0, longest=99):
    """A reward model that likes long answers: ``scale`` per word."""

    def rewards(prompts, answers):
        return [np.array([scale * len(a.split()) for a in own]) for own in answers]

    def encoder(e):
        fits = all(len(a.split()) <= longest for a in e.completions)
        return SimpleNamespace(answers=[np.array(list(map(ord, a))) for a in e.completions]) if fits else None

    return SimpleNamespace(rewards=rewards, encoder=encoder, folder=tmp_path)


def pair(i, first, second, **meta):
    return Preference(f"ask {i}", "w " * first, "v " * second, id=f"x:{i}", meta=meta)


LABELLED = [replace(pair(i, 2, 1), margin=0.5) for i in range(4)]
POOL = [
    pair(10, 9, 1, gold_chosen=1.0, gold_rejected=0.0), pair(11, 1, 9, gold_chosen=0.2, gold_rejected=0.7),
    pair(12, 3, 2, gold_chosen=0.0, gold_rejected=1.0), pair(13, 4, 4, gold_chosen=1.0, gold_rejected=0.0),
]  # fmt: skip


def rounds(policy, round=1, inputs=None, seed=0, **options):
    inputs = inputs or {"labelled": LABELLED, "unlabelled": POOL}
    return ssrm(**options).round(inputs, policy=policy, round=round, rng=np.random.default_rng(seed))


def test_contract():
    check_part("source/ssrm")


def test_the_first_round_is_the_labelled_pairs_alone(tmp_path):
    made = rounds(length_policy(tmp_path), 0)
    assert sorted(e.prompt for e in made) == [e.prompt for e in LABELLED]
    assert all(e.margin is None for e in made)
    assert not (tmp_path / "rounds").exists()


def test_where_the_model_prefers_the_second_answer_it_becomes_the_chosen_one(tmp_path):
    """σ(8), σ(-8), σ(1) = 0.73, and a tie: at 0.8 two are kept, the second of them exchanged with what is said of it."""
    made = {e.prompt: e for e in rounds(length_policy(tmp_path)) if e.meta.get("pseudo")}
    assert set(made) == {"ask 10", "ask 11"}
    assert (made["ask 10"].chosen, made["ask 10"].rejected) == (POOL[0].chosen, POOL[0].rejected)
    assert (made["ask 11"].chosen, made["ask 11"].rejected) == (POOL[1].rejected, POOL[1].chosen)
    assert (made["ask 11"].meta["gold_chosen"], made["ask 11"].meta["gold_rejected"]) == (0.7, 0.2)
    assert made["ask 11"].meta["confidence"] == pytest.approx(1 / (1 + np.exp(-8)))


def test_an_inverted_pool_gives_the_same_pairs(tmp_path):
    inverted = [replace(e, chosen=e.rejected, rejected=e.chosen) for e in POOL]
    policy = length_policy(tmp_path)
    a = rounds(policy, threshold=0.5)
    b = rounds(policy, threshold=0.5, inputs={"labelled": LABELLED, "unlabelled": inverted})
    assert [(e.prompt, e.chosen, e.rejected) for e in a] == [(e.prompt, e.chosen, e.rejected) for e in b]
    assert all(len(e.chosen) > len(e.rejected) for e in a)


@pytest.mark.parametrize(("threshold", "kept"), [(1.0, 0), (0.99, 2), (0.73, 3), (0.74, 2), (0.5, 3)])
def test_thresholds(tmp_path, threshold, kept):
    """1 keeps nothing, 0.5 keeps all but ties."""
    made = rounds(length_policy(tmp_path), threshold=threshold)
    assert len(made) == len(LABELLED) + kept
    assert sum(bool(e.meta.get("pseudo")) for e in made) == kept


def test_every_round_selects_from_the_whole_pool_with_the_weights_of_that_moment(tmp_path):
    before = rounds(length_policy(tmp_path), 1)
    after = {e.prompt: e for e in rounds(length_policy(tmp_path, scale=-1.0), 2) if e.meta.get("pseudo")}
    assert {e.prompt for e in before if e.meta.get("pseudo")} == set(after)
    assert after["ask 10"].chosen == POOL[0].rejected


def test_size_and_copies(tmp_path):
    made = rounds(length_policy(tmp_path), size=15)  # the union has 6: twice through and half of it again
    counts = {}
    for e in made:
        counts[e.prompt] = counts.get(e.prompt, 0) + 1
    assert len(made) == 15
    assert set(counts.values()) == {2, 3}
    assert len(set(e.prompt for e in made[:6])) == 6
    assert len(rounds(length_policy(tmp_path), copies=3)) == 3 * len(LABELLED) + 2


def test_random_selection_takes_as_many(tmp_path):
    """The control arm, over seeds: the same number (less ties), any of the pool."""
    kept = [{e.prompt for e in rounds(length_policy(tmp_path), seed=s, selection="random") if e.meta.get("pseudo")}
            for s in range(30)]  # fmt: skip
    assert {len(k) for k in kept} <= {1, 2}
    assert set().union(*kept) == {"ask 10", "ask 11", "ask 12"}  # the tie never


def test_temperature_lowers_confidence(tmp_path):
    assert len(rounds(length_policy(tmp_path), temperature=8.0)) == len(LABELLED)  # σ(1) < 0.8


def test_lists_of_two_and_unusable_pairs(tmp_path):
    lists = [
        Ranked("ask 20", ("w w w w w", "v"), (0.0, 9.0)), Ranked("ask 21", ("same", "same"), (0.0, 0.0)),
        Ranked("ask 22", ("w " * 50, "v"), (0.0, 0.0)),
    ]  # fmt: skip
    made = rounds(length_policy(tmp_path, longest=20), inputs={"labelled": LABELLED, "unlabelled": lists}, threshold=0.5)
    found = [e for e in made if e.meta.get("pseudo")]
    assert [(e.prompt, e.chosen) for e in found] == [("ask 20", "w w w w w")]  # the scores are not looked at
    labelled = [Ranked("ask 1", ("a", "b b"), (0.0, 1.0)), Ranked("ask 2", ("a", "b"), (1.0, 1.0))]
    assert [e.chosen for e in rounds(length_policy(tmp_path), 0, {"labelled": labelled, "unlabelled": POOL})] == ["b b"]


def test_refusals(tmp_path):
    policy = length_policy(tmp_path)
    with pytest.raises(UsageError, match="labelled and unlabelled, not train"):
        rounds(policy, inputs={"train": LABELLED})
    with pytest.raises(UsageError, match="3 answers"):
        rounds(policy, inputs={"labelled": LABELLED, "unlabelled": [Ranked("x", ("a", "b", "c"), (0.0, 0.0, 0.0))]})
    with pytest.raises(UsageError, match="no labelled list"):
        rounds(policy, inputs={"labelled": [Ranked("x", ("a", "b"), (0.0, 0.0))], "unlabelled": POOL})
    with pytest.raises(UsageError, match="threshold"):
        ssrm(threshold=0.4)


def test_report(tmp_path):
    rounds(length_policy(tmp_path))
    found = json.loads((tmp_path / "rounds" / "report-0002.json").read_text())
    assert found["selected"] == 0.5
    assert found["labelled"] == 4
    assert found["accuracy"] == pytest.approx((1 + 1 + 0 + 0.5) / 4)
    assert found["selected_accuracy"] == 1.0
    p = np.array([1 / (1 + np.exp(-8)), 1 / (1 + np.exp(8)), 1 / (1 + np.exp(-1)), 0.5])
    c = np.maximum(p, 1 - p)
    assert found["calibration_error"] == pytest.approx((abs(2 - c[0] - c[1]) + abs(0 - c[2]) + abs(0.5 - 0.5)) / 4)
    assert "accuracy" not in report([pair(1, 2, 1)], np.array([0.9]), np.array([True]))


def test_calibration_error_against_loops():
    rng = np.random.default_rng(0)
    c, right = rng.uniform(0.5, 1, 400), rng.integers(0, 2, 400).astype(float)
    c[0] = 1.0
    total = 0.0
    for b in range(10):
        inside = [i for i in range(400) if (0.5 + b / 20 <= c[i] < 0.55 + b / 20) or (b == 9 and c[i] == 1.0)]
        if inside:
            total += len(inside) / 400 * abs(np.mean(right[inside]) - np.mean(c[inside]))
    assert calibration_error(c, right) == pytest.approx(total)
    assert calibration_error(np.full(10, 0.75), np.array([1.0] * 7 + [0.0] * 3)) == pytest.approx(0.05)


def test_selected_and_order():
    p = np.array([0.9, 0.1, 0.5, 0.55])
    assert selected(p, 0.5).tolist() == [True, True, False, True]
    assert selected(p, 0.9).tolist() == [False] * 4  # above, not at
    kept = pseudo_labelled(POOL, p, np.array([False, True, False, True]))
    assert [e.chosen for e in kept] == [POOL[1].rejected, POOL[3].chosen]


# --- with the engine -------------------------------------------------------------------------------------------------


def written(folder, name, rows):
    (folder / name).write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(folder / name)


def run_of(folder, *, threshold=0.8, seed=5, steps=9, number=72, labelled=24, **more):
    rows = wordpairs.pairs(number, seed)
    hidden = [{k: v for k, v in r.items() if not k.startswith("score")} for r in rows[labelled:]]
    inputs = {"labelled": written(folder, "l.jsonl", rows[:labelled]), "unlabelled": written(folder, "u.jsonl", hidden)}
    return {
        "model": "lab/words-sft", "objective": "bradley-terry", "optimizer": {"adamw": {"lr": 1e-3}}, "schedule": "constant",
        "data": {"train": inputs, "source": {"ssrm": {"threshold": threshold, "size": labelled}}, "max_length": 128},
        "train": {"steps": steps, "batch": 8, **more},
    }  # fmt: skip


def quietly(run, out):
    return train(run, out=out, quiet=True, handle_signals=False)


def test_threshold_1_is_training_on_the_labelled_pairs_alone(tmp_path):
    """The same weights as with another pool, and as of a plain run on the pairs in the order of the rounds."""
    run = run_of(tmp_path, threshold=1.0)
    quietly(run, tmp_path / "a")
    other = dict(run, data={**run["data"], "train": {**run["data"]["train"], "unlabelled": "lab/preferences-held-out"}})
    quietly(other, tmp_path / "b")
    lines = [(tmp_path / "a" / "rounds" / f"round-{i:04d}.jsonl").read_text() for i in (1, 2, 3)]
    (tmp_path / "plain.jsonl").write_text("".join(lines))
    plain = {**run, "data": {"train": str(tmp_path / "plain.jsonl"), "shuffle": False, "max_length": 128}}
    quietly(plain, tmp_path / "c")
    a, b, c = (open_run(tmp_path / n).bundle.model.state_dict() for n in "abc")
    for name, value in a.items():
        assert torch.equal(value, b[name]), name
        torch.testing.assert_close(value, c[name], rtol=0, atol=0)
    reports = [json.loads((tmp_path / "a" / "rounds" / f"report-{i:04d}.json").read_text()) for i in (2, 3)]
    assert [r["selected"] for r in reports] == [0.0, 0.0]


def test_a_run_labels_by_its_own_reward(tmp_path):
    """Labels of the second round are those of the weights that a run of the first round alone ends with, scored one by one."""
    model = open_run(quietly(run_of(tmp_path, steps=3), tmp_path / "short").folder).bundle.model
    encoder = Encoder(models.load("lab/words-sft").tokenizer, max_length=128, truncate="drop", on_empty="drop")

    def preferred(row):
        with torch.no_grad():
            item = encoder(Ranked(row.prompt, (row.chosen, row.rejected), (0.0, 0.0)))
            first, second = answer_rewards(model, collate([item], pad_id=1)).tolist()
        return (row.prompt, row.chosen) if first > second else (row.prompt, row.rejected)

    longer = quietly(run_of(tmp_path, steps=6, threshold=0.5), tmp_path / "longer").folder
    told = [json.loads(line) for line in (longer / "rounds" / "round-0002.jsonl").read_text().splitlines()]
    got = {(r["prompt"], r["chosen"]) for r in told if r.get("pseudo")}
    pool = [Preference(r["prompt"], r["chosen"], r["rejected"]) for r in wordpairs.pairs(72, 5)[24:]]
    expected = {preferred(e) for e in pool}
    assert len(got) > 8
    assert got <= expected
    assert any((e.prompt, e.rejected) in got for e in pool)


def test_other_objectives_are_refused(tmp_path):
    run = {**run_of(tmp_path), "objective": "dpo"}
    with pytest.raises(UsageError, match="no reward model"):
        quietly(run, tmp_path / "r")


def test_self_training_on_the_word_language(tmp_path):
    """What the model is sure of it labels better than the rest."""
    run = run_of(tmp_path, seed=3, number=360, labelled=120, steps=20, batch=16)
    quietly(run, tmp_path / "r")
    found = [json.loads(p.read_text()) for p in sorted((tmp_path / "r" / "rounds").glob("report-*.json"))]
    assert found[-1]["selected_accuracy"] > 0.8
    assert found[-1]["selected_accuracy"] > found[-1]["accuracy"] > 0.6


# --- the judge that reads both answers -------------------------------------------------------------------------------


def test_order_averaging_is_consistent_for_any_logits():
    g = torch.Generator().manual_seed(0)
    ab, ba = (5 * torch.randn(40, 2, generator=g, dtype=torch.float64) for _ in range(2))
    p, other = pairwise.order_averaged(ab, ba), pairwise.order_averaged(ba, ab)
    torch.testing.assert_close(p + other, torch.ones_like(p))
    one = lambda z: 1 / (1 + torch.exp(z[:, 1] - z[:, 0]))
    torch.testing.assert_close(p, (one(ab) + 1 - one(ba)) / 2)
    biased = torch.tensor([[9.0, -9.0]])  # always says A
    assert pairwise.order_averaged(biased, biased).item() == pytest.approx(0.5)


def test_probabilities_of_a_model():
    """Against transformers' logits; and p(a, b) + p(b, a) = 1 for an untrained model."""
    bundle = models.load("lab/llama-50k", seed=3)
    rows = [("why?", "because it is", "no"), ("say x", "x", "y z")]
    p = pairwise.probabilities(bundle.model, bundle.tokenizer, rows)
    np.testing.assert_allclose(p + pairwise.probabilities(bundle.model, bundle.tokenizer, [(x, b, a) for x, a, b in rows]), 1)
    a, b = pairwise.label_ids(bundle.tokenizer)
    text = (
        "[CONTEXT] why? [RESPONSE A] because it is [RESPONSE B] no",
        "[CONTEXT] why? [RESPONSE A] no [RESPONSE B] because it is",
    )
    z = [bundle.model(**bundle.tokenizer(t, return_tensors="pt")).logits[0, -1].softmax(-1).detach() for t in text]
    assert p[0] == pytest.approx(float(z[0][a] / (z[0][a] + z[0][b]) + z[1][b] / (z[1][a] + z[1][b])) / 2, rel=1e-5)


def test_labels_are_single_tokens():
    with pytest.raises(UsageError, match="not one token"):
        pairwise.label_ids(models.load("lab/words-sft").tokenizer)  # it has no letters


def test_training_rows_place_the_better_answer_at_random():
    rng = np.random.default_rng(0)
    rows = [pairwise.judged_row("x", "good", "bad", rng) for _ in range(400)]
    first = [r for r in rows if r["completion"] == "A"]
    assert 160 < len(first) < 240
    assert all(r["prompt"] == pairwise.template("x", "good", "bad") for r in first)
    assert all(r["prompt"] == pairwise.template("x", "bad", "good") for r in rows if r["completion"] == "B")
