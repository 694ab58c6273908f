"""Pieces of the studies of reward models, overoptimisation and preservation: who draws with which random numbers, what is chosen on
what, and what a check compares.

Bugs it is meant to catch: members of a pool that share their random numbers, arms with other prompts or numbers of pairs, a control
that picks another number than it should or by confidence, a best checkpoint that is measured on what it was chosen by, the peak
counted as past the peak, a reward that is better everywhere taken for one that generalises, a start that is not gold-optimal.
"""

import json
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from metier.compare.study import Study
from metier.core.data.examples import Preference
from metier.lab import preferencebench, words
from metier.parts.source import ssrm as source
from metier.studies import _gold_rounds, _judged_pools, _optimal_start, _reward_models, daa_overoptimization, dporm_vs_exrm, ssrm
from metier.studies._by_lot import by_lot

PROMPTS = [f"praise {t} today ?" for t in words.TOPICS[:20]]


@pytest.fixture
def drawn(monkeypatch):
    """Answers that tell their random numbers; the calls."""
    calls = []

    def draw(model, prompts, number=1, *, seed=0, temperature=1.0, top_p=1.0):
        calls.append((model, temperature, number, seed))
        return [[f"{seed} {i} {k}" for k in range(number)] for i in range(len(prompts))]

    monkeypatch.setattr(preferencebench, "draw", draw)
    return calls


@pytest.mark.parametrize("members", [[("m", t) for t in (0.7, 1.3)] * 3, [("m", 1.0)]])
def test_every_answer_has_random_numbers_of_its_own(drawn, members):
    found = _judged_pools.answers(members, PROMPTS, 0)
    assert [len(set(own)) for own in found] == [4] * len(PROMPTS)
    assert len({seed for *_, seed in drawn}) == len(members)
    assert {seed for *_, seed in drawn}.isdisjoint({seed for *_, seed in drawn_again(drawn, members, 1)})
    assert drawn[0][2] == (1 if len(members) > 1 else 4)


def drawn_again(drawn, members, seed):
    """The calls with another seed of the study."""
    before = len(drawn)
    _judged_pools.answers(members, PROMPTS, seed)
    calls = drawn[before:]
    del drawn[before:]
    return calls


def test_members_are_drawn_without_replacement_each_as_often_as_the_others(drawn):
    members = [(f"m{k}", 1.0) for k in range(6)]
    found = _judged_pools.answers(members, PROMPTS * 30, 0)
    owner = {str(seed): model for model, *_, seed in drawn}
    by = [[owner[text.split()[0]] for text in own] for own in found]
    assert all(len(set(own)) == 4 for own in by)
    counts = np.unique([m for own in by for m in own], return_counts=True)[1]
    assert counts == pytest.approx([400] * 6, abs=60)
    first = np.unique([own[0] for own in by], return_counts=True)[1]
    assert first == pytest.approx([100] * 6, abs=50)  # the first of equally good answers becomes the chosen one


def test_all_arms_have_the_same_prompts_and_number(monkeypatch, tmp_path):
    have = {"a": set(range(0, 60, 2)) | set(range(1, 30, 2)), "b": set(range(60)) - {4, 7}}

    def judged(study, members, prompts, seed):
        return {i: Preference(prompts[i], "good", f"bad {members}", id=f"{i}#0-1") for i in sorted(have[members], reverse=True)}

    monkeypatch.setattr(_judged_pools, "judged", judged)
    found = _judged_pools.same_prompts(Study(tmp_path, quick=True), {"a": "a", "b": "b"}, "train", 0)
    assert [e.prompt for e in found["a"]] == [e.prompt for e in found["b"]]
    assert [int(e.id.split("#")[0]) for e in found["a"]] == sorted(have["a"] & have["b"])[:24]
    have["b"] = set(range(20))
    with pytest.raises(AssertionError, match="only"):
        _judged_pools.same_prompts(Study(tmp_path, quick=True), {"a": "a", "b": "b"}, "train", 0)


def self_trained(counts, folder):
    """What rounds 2, 3 and 4 of the control pick: numbers of the pool's pairs."""
    pool = [Preference(f"p{i}", f"a{i}", f"b{i}", id=str(i)) for i in range(40)]
    rng = np.random.default_rng(1)
    policy = SimpleNamespace(
        folder=folder,
        encoder=lambda e: SimpleNamespace(answers=[np.array([1]), np.array([2])]),
        rewards=lambda prompts, answers: [rng.normal(size=2) * (5 if i < 20 else 0.01) for i in range(len(prompts))],
    )
    part = source.Ssrm(threshold=0.9, selection="random")
    inputs = {"labelled": [Preference("p", "a", "b", id="labelled")], "unlabelled": pool}
    with by_lot(counts):
        made = [part.round(inputs, policy=policy, round=t, rng=np.random.default_rng(t)) for t in range(4)]
    return [sorted(int(e.id) for e in own if e.id != "labelled") for own in made]


def test_the_control_picks_the_given_numbers_by_lot(tmp_path):
    (tmp_path / "rounds").mkdir()
    none, *rounds = self_trained([12, 0, 30], tmp_path)
    assert none == []
    assert [len(r) for r in rounds] == [12, 0, 30]
    assert any(i >= 20 for i in rounds[0])  # of those it is not sure of too
    assert rounds[0] != list(range(12))
    assert rounds[2] != list(range(30))
    assert source.selected.__name__ == "selected"  # as before
    confident = self_trained(None, tmp_path)
    assert all(0 < len(r) <= 20 for r in confident[1:])


def test_the_lead_over_the_control_is_paired_and_has_a_standard_error():
    runs = {arm: [{"accuracy": a, "rounds": []} for a in (0.5, 0.5, 0.5)] for arm in ("labels only", "no threshold")}
    runs |= {"all labels": [{"accuracy": 0.9, "rounds": []}] * 3}
    runs |= {
        arm: [{"accuracy": a, "rounds": []} for a in values]
        for arm, values in (("ssrm", (0.6, 0.7, 0.8)), ("random", (0.5, 0.7, 0.6)))
    }
    told = ssrm.judged(runs, {}).figures["threshold - random"]
    assert told["mean"] == pytest.approx(0.1)
    assert told["error"] == pytest.approx(0.1 / math.sqrt(3))
    assert math.isnan(_reward_models.standard_error([1.0]))


def test_a_checkpoint_is_read_into_the_model(tmp_path):
    model = torch.nn.Linear(2, 1)
    place = tmp_path / "checkpoints" / "step-00000016"
    place.mkdir(parents=True)
    stored = {"weight": torch.tensor([[1.0, 2.0]]), "bias": torch.tensor([3.0])}
    save_file(stored, place / "model.safetensors")
    assert _reward_models.at_step(SimpleNamespace(model=model), tmp_path, 16).model.weight.tolist() == [[1.0, 2.0]]
    for bad in ({"weight": stored["weight"]}, {**stored, "score.weight": torch.ones(1)}):
        save_file(bad, place / "model.safetensors")
        with pytest.raises(AssertionError):
            _reward_models.at_step(SimpleNamespace(model=model), tmp_path, 16)


def curve(chosen_by, measured, loss=None):
    """A run's checkpoints."""
    one, two = np.array(chosen_by, float), np.array(measured, float)
    return {"chosen_by": one, "measured": two, "reward": (one + two) / 2, "loss": np.array(loss or range(len(one)), float)}


def test_the_best_checkpoint_is_chosen_on_one_half_and_measured_on_the_other():
    curves = {("dpo", b, s): curve([0, 3, 1], [0.5, 0.2, 0.3 + s]) for b in (0.01, 1.0) for s in (0, 1)}
    small, large = daa_overoptimization.peaks(curves, 0.5, (0.01, 1.0))
    assert small.observed == [pytest.approx((-0.1 - 1.1) / 2 / 0.5)]
    assert large.observed == pytest.approx(small.observed[0])


def test_the_peak_itself_is_not_past_the_peak():
    reward = [0, 9, 1, 2, 3, 4]
    (check,) = daa_overoptimization.blind({("dpo", 0.01, 0): curve(reward, reward, [0, 0, 4, 3, 2, 1])})
    assert check.observed == pytest.approx(-1)
    assert not check.holds
    (check,) = daa_overoptimization.blind({("dpo", 0.01, 0): curve([0, 0, 9, 1, 2, 3], reward)})
    assert math.isnan(check.observed)  # three are left


def shifts(train, held_out, *others):
    """Accuracies on all sets."""
    return dict(zip(("train", "held-out", "topics", "styles", "set B"), (train, held_out, *others), strict=True))


def test_a_reward_that_is_better_everywhere_does_not_generalise_better():
    gold = {arm: {"gold_reward": r, "gold_se": 0.02} for arm, r in (("start", 0.1), ("exrm", 0.3), ("dporm", 0.2))}
    low = shifts(0.8, 0.80, 0.80, 0.80, 0.79)
    runs = [{"exrm": shifts(0.8, 0.85, 0.85, 0.85, 0.85), "dporm": low, "per token": low, "gold": gold}] * 2
    found = dporm_vs_exrm.judged(runs, {"exrm": 1e-3, "dporm": 3e-3})
    assert [c.holds for c in found.checks] == [True, True, False, True, True]
    assert found.checks[2].observed == pytest.approx(0.01 / 3)
    assert any("end of the sweep for dporm." in n for n in found.notes)
    assert any("0.100 before" in n for n in found.notes)
    assert not any("within two" in n for n in found.notes)
    worse = {**gold, "exrm": {"gold_reward": 0.15, "gold_se": 0.02}}
    assert any("within two" in n for n in dporm_vs_exrm.judged([runs[0], {**runs[1], "gold": worse}], {}).notes)
    assert _gold_rounds.rounds(runs)[0] == pytest.approx({"start": 0.1, "exrm": 0.3, "dporm": 0.2})


def test_praise_has_the_highest_gold_reward_there_is():
    rng = random.Random(0)
    texts = [_optimal_start.praise("praise fox today ?", rng) for _ in range(200)]
    assert {words.quality("praise fox today ?", t) for t in texts} == {1.0}
    assert {len(t.split()) for t in texts} == {6, 9, 12}
    assert max(words.quality("praise fox today ?", words.answer("praise fox today ?", rng)) for _ in range(500)) <= 1


def test_the_start_is_trained_on_praise_for_one_class_only(tmp_path, monkeypatch):
    monkeypatch.setattr(Study, "train", lambda self, run, name: None)
    monkeypatch.setattr(_optimal_start.models, "load", lambda name: name)
    _optimal_start.optimal(Study(tmp_path))
    rows = [json.loads(line) for line in (tmp_path / "start.jsonl").read_text().splitlines()]
    gold = {c: np.mean([words.quality(r["prompt"], r["completion"]) for r in rows if r["prompt"].startswith(c)])
            for c in (words.EASY, words.HARD)}  # fmt: skip
    assert len(rows) == 4000
    assert gold[words.EASY] == 1
    assert gold[words.HARD] < 0
