"""source/alma: prompts, pool, judge and pairs, each against numbers worked out by hand or simulated.

Bugs it is meant to catch: the same demonstrations in every call, near-duplicates of given prompts kept, a checkpoint without
a share of the pool, one judgement where several are asked for, the pair of best and second best.
"""

import math

import numpy as np
import pytest
from _answering import (
    FOLLOWED,
    REWARD,
    Made,
    build,
    check_resumes,
    losses,
    prompted,
    prompts_file,
    rounds,
    rows_of,
    word_run,
)

from metier import train
from metier.core.context import derive_seed
from metier.core.data.examples import Prompted
from metier.core.errors import UsageError
from metier.core.sample import sample
from metier.lab import preferencebench, words
from metier.parts.source import _alma
from metier.testing import check_part

COUNT = {"lexicon": {"good": ["good"], "bad": ["bad"], "per": "count"}}


def test_contract():
    check_part("source/alma")


# --- judge ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gap", "noise", "number"), [(0.5, 1.0, 1), (0.5, 1.0, 8), (0.2, 0.8, 16), (1.0, 0.5, 2)])
def test_accuracy_of_averaged_judgements(gap, noise, number):
    """Noise of sd q on each judgement: accuracy Φ(gap √s / (q √2)) within one point."""
    rng = np.random.default_rng(0)
    pairs = 200_000 // number
    truth = np.array([gap, 0.0])
    scores = _alma.averaged(truth + noise * rng.standard_normal((number, pairs, 2)))
    expected = 0.5 * (1 + math.erf(gap * math.sqrt(number) / (noise * math.sqrt(2)) / math.sqrt(2)))
    assert np.mean(scores[:, 0] > scores[:, 1]) == pytest.approx(expected, abs=0.01)


def test_many_drawn_grades_tend_to_the_expectation():
    p = np.array([0.05, 0.1, 0.2, 0.4, 0.25])
    grades = np.arange(1, 6)
    drawn = np.random.default_rng(1).choice(grades, (40_000, 1), p=p)
    assert _alma.averaged(drawn)[0] == pytest.approx(float(grades @ p), abs=4 * np.sqrt(1.29 / 40_000))
    assert np.std([_alma.averaged(drawn[i : i + 100])[0] for i in range(0, 40_000, 100)]) == pytest.approx(0.11, abs=0.02)


def test_the_judge_is_called_as_often_as_asked(tmp_path):
    (tmp_path / "judge.py").write_text(
        "calls = [0]\ndef judge(prompts, completions, answers):\n    calls[0] += 1\n"
        "    return [[(1.0 if t == 'a' else 0.0) + (4.0 if calls[0] == 1 and t == 'b' else 0.0) for t in own] for own in completions]\n",
        encoding="utf-8",
    )
    judge = {"python": {"function": f"{tmp_path / 'judge.py'}:judge"}}
    policy = Made(lambda p, n, c: ["a", "b"])
    (once,) = rounds(build("alma", reward=judge, pool=2), prompted(1), policy)
    assert [(e.chosen, e.margin) for e in once] == [("b", 3.0)]
    (often,) = rounds(build("alma", reward=judge, pool=2, judge_samples=5), prompted(1), policy)
    assert [(e.chosen, e.margin) for e in often] == [("a", pytest.approx(1 - 4 / 5))]


def test_right_answers_reach_the_judge():
    given = [Prompted(f"p{k}", meta={"answer": str(k)}) for k in (4, 5)]
    (made,) = rounds(build("alma", reward="arithmetic", pool=2), {"t": given}, Made(lambda p, n, c: ["it is 4", "it is 5"]))
    assert {(e.prompt, e.chosen, e.rejected) for e in made} == {("p4", "it is 4", "it is 5"), ("p5", "it is 5", "it is 4")}


# --- pairs and pool ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scores", "low", "expected"),
    [
        ([1, 3, 2, 0], 0.0, (1, 3)), ([1, 3, 2, 0], 0.34, (1, 0)), ([1, 3, 2, 0], 0.67, (1, 2)), ([1, 3, 2, 0], 1.0, None),
        ([2, 2, 2], 0.0, None), ([0, 0, 5], 0.0, (2, 0)), ([float("nan"), 1, 4], 0.0, (2, 1)),
        ([float("nan")] * 2, 0.0, None), ([1, float("nan")], 0.0, None),
    ],
)  # fmt: skip
def test_best_and_low(scores, low, expected):
    assert _alma.best_and_low(scores, low) == expected


def test_shares_of_the_pool():
    assert _alma.shares(16, 1) == [16]
    assert _alma.shares(16, 3) == [6, 5, 5]
    assert _alma.shares(2, 4) == [1, 1, 0, 0]
    assert all(sum(_alma.shares(m, c)) == m for m in range(2, 40) for c in range(1, 9))


class Several(Made):
    """A policy whose other models speak with another voice."""

    def other(self, where):
        made = Several(lambda p, n, c: [f"{where} {t}" for t in self.says(p, n, c)])
        made.calls = self.calls
        return made


def test_every_checkpoint_answers():
    policy = Several(lambda p, n, c: [f"{'good ' * k}bad" for k in range(n)])
    source = build("alma", reward=COUNT, checkpoints=["early", "late"], pool=7, temperatures=[1.0, 0.5])
    (made,) = rounds(source, prompted(2), policy)
    assert [(c["number"], c["temperature"]) for c in policy.calls] == [(3, 1.0), (2, 0.5), (2, 1.0)]
    assert len({c["seed"] for c in policy.calls}) == 3
    assert {(e.chosen, e.rejected, e.margin) for e in made} == {("good good bad", "bad", 2.0)}


def test_one_checkpoint_is_best_of_m(tmp_path):
    """Chosen is the best of M plain samples of the model, by the same random numbers; the rejected one their worst."""
    run = word_run(prompts_file(tmp_path, 12), {"alma": {"reward": REWARD, "pool": 6, "max_new_tokens": 24}}, "dpo", steps=1)
    train(run, out=tmp_path / "run", quiet=True)
    bundle = preferencebench.sft()
    asked = words.prompts(12, 1)
    seed = int(np.random.default_rng(derive_seed(0, "source", 0)).integers(2**31))
    ids = preferencebench.encode(asked)
    drawn = sample(bundle.model, bundle.tokenizer, ids, number=6, max_new_tokens=24, seed=seed)

    def score(text):
        found = [words.sentiment(w) for w in text.split()]
        return (found.count("good") - found.count("bad")) / max(1, len(found))

    expected = {}
    for prompt, own in zip(asked, drawn, strict=True):
        scores = [score(a.text) for a in own if a.ended and a.text]
        if max(scores) > min(scores):
            expected[prompt] = (max(scores), min(scores))
    found = {r["prompt"]: (score(r["chosen"]), score(r["rejected"])) for r in rows_of(tmp_path / "run", 1)}
    assert found == expected


# --- prompts ----------------------------------------------------------------------------------------------------------

KNOWN = ["Name three rivers of Europe.", "Explain how a violin makes sound."]


def test_filter_removes_planted_duplicates_and_is_idempotent():
    rng = np.random.default_rng(0)
    vocabulary = [f"w{i}" for i in range(200)]
    fresh = [" ".join(rng.choice(vocabulary, 12)) for _ in range(60)]
    near = [f"{t.upper()}!" for t in fresh[:10]] + [t.replace(t.split()[0], "other", 1) for t in fresh[10:20]]
    planted = [*fresh[:30], *near, *KNOWN, *fresh[30:], *fresh[:5], "too short", "x " * 200, "name three rivers of Europe"]
    kept = _alma.distinct(planted, KNOWN)
    assert kept == fresh
    assert _alma.distinct(kept, KNOWN) == kept
    assert _alma.distinct(fresh, fresh) == []


def test_overlap_is_the_jaccard_index_of_trigrams():
    """a b c d e f has 4 trigrams; with x for f, 3 are shared of 5."""
    first, second = "a b c d e f", "a b c d e x"
    assert _alma.distinct([first, second], overlap=0.61) == [first, second]
    assert _alma.distinct([first, second], overlap=0.6) == [first]
    assert _alma.distinct(["One two?", "one two"], shortest=1) == ["One two?"]


def test_a_new_prompt_is_split_out():
    assert _alma.split_out(" Draw a cat.\n###\nTask: more", False) == "Draw a cat."
    assert _alma.split_out(" Draw a cat", True) == "Draw a cat"
    assert _alma.split_out(" Draw a c", False) is None
    assert _alma.split_out("\n###\n", True) is None
    assert _alma.few_shot(["A b", "C d"]) == "Task: A b\n###\nTask: C d\n###\nTask:"


def test_demonstrations_are_drawn_anew_for_every_call():
    texts = iter(f"say {i} {i + 1} {i + 2} {i + 3}" for i in range(1000))
    policy = Made(lambda p, n, c: [next(texts)] if p.startswith("Task:") else ["good", "bad"])
    source = build("alma", reward=COUNT, pool=2, prompts=0, synthesize=20, demos=3)
    (made,) = rounds(source, prompted(8), policy)
    calls = [p for c in policy.calls for p in c["prompts"] if p.startswith("Task:")]
    shown = [tuple(line.removeprefix("Task: ") for line in p.split("\n###\n")[:-1]) for p in calls]
    assert all(len(set(s)) == 3 for s in shown)
    assert len(set(shown)) > 15
    assert {d for s in shown for d in s} == {f"p{i}" for i in range(8)}
    assert len(made) == 20
    assert all(e.prompt.startswith("say") and e.meta == {"synthetic": True} for e in made)


def test_given_and_new_prompts_together():
    says = lambda p, n, c: [f"a new prompt {c}"] if p.startswith("Task:") else ["good", "bad"]
    source = build("alma", reward=COUNT, pool=2, prompts=2, synthesize=3, demos=2)
    (made,) = rounds(source, prompted(5), Made(says))
    assert {e.prompt for e in made} == {"p0", "p1", *(f"a new prompt {c}" for c in range(3))}, "one new text in each call"


def test_wrong_options():
    with pytest.raises(UsageError, match="neither given prompts nor"):
        build("alma", reward=COUNT, prompts=0)
    with pytest.raises(UsageError, match="demos = 8, but 3 prompts"):
        rounds(build("alma", reward=COUNT, synthesize=1), prompted(3), Made(lambda p, n, c: ["a"]))
    with pytest.raises(UsageError, match="lexikon"):
        build("alma", reward="lexikon")


def test_two_rounds_resumed_in_the_second_with_an_earlier_run_in_the_pool(tmp_path):
    data = prompts_file(tmp_path, 20)
    first = word_run(data, {"alma": {"reward": REWARD, "pool": 2, "max_new_tokens": 24}}, "dpo", steps=1)
    train(first, out=tmp_path / "earlier", quiet=True)
    source = {
        "reward": REWARD, "pool": 6, "checkpoints": [str(tmp_path / "earlier"), "lab/words-sft"], "max_new_tokens": 24,
        "prompts": 12, "synthesize": 2, "demos": 4, "shortest": 1, "low": 0.25,
    }  # fmt: skip
    run = word_run(data, {"alma": source}, "dpo", hooks=[FOLLOWED], steps=6, batch=4)
    whole = check_resumes(run, tmp_path, stop=5)
    assert whole.status == "done"
    assert losses(whole)[0] == pytest.approx(math.log(2), abs=1e-5)
    assert all(r["margin"] > 0 for n in (1, 2) for r in rows_of(tmp_path / "whole", n))
