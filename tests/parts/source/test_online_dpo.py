"""source/online-dpo: best and worst of the sampled answers by the reward, in rounds that a resumed run reads again.

Bugs it is meant to catch: best and worst exchanged, ties or equal texts made into pairs, unfinished answers trained on, prompts
that never come, a resumed run that samples its round anew with later weights.
"""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from metier import train
from metier.core import part
from metier.core.data.examples import Prompted
from metier.parts.reward.arithmetic import final_number

REWARD = {"python": {"function": "metier.lab.judges:quality"}}


class Fake:
    """Answers by prompt."""

    def __init__(self, answers):
        self.answers, self.asked = answers, []

    def sample(self, prompts, number, **options):
        self.asked.append((list(prompts), number, options))
        return [[SimpleNamespace(text=t, ended=e) for t, e in self.answers[p]] for p in prompts]


def source(reward, **options):
    made = part.build("source", {"online-dpo": {"reward": "arithmetic", **options}}).obj
    made.reward = reward
    return made


def length(prompts, completions, answers):
    widest = max(map(len, completions))
    return np.array([[float(len(t)) for t in row] + [99.0] * (widest - len(row)) for row in completions])


def test_best_and_worst_by_the_reward():
    policy = Fake({"p": [("aa", True), ("aaaa", True), ("a", True)], "q": [("b", True), ("b", True), ("b", True)],
                   "r": [("cc", True), ("dd", True), ("ee", True)], "s": [("x", True), ("yyy", False), ("zz", True)]})  # fmt: skip
    inputs = {"train": [Prompted(p, meta={"n": p}) for p in "pqrs"]}
    rng = np.random.default_rng(0)
    found = source(length, number=3).round(inputs, policy=policy, round=0, rng=rng)
    assert [(e.prompt, e.chosen, e.rejected, e.margin) for e in found] == [("p", "aaaa", "a", 3.0), ("s", "zz", "x", 1.0)]
    assert found[0].meta == {"n": "p"}
    kept = source(length, number=3, finished=False).round(inputs, policy=policy, round=0, rng=rng)
    assert kept[-1].chosen == "yyy"


def test_right_answers_reach_the_reward():
    """Without them reward/arithmetic cannot judge at all; each prompt is judged by its own."""
    policy = Fake({p: [("it is 4", True), ("it is 5", True)] for p in ("2+2", "2+3")})
    inputs = {"train": [Prompted("2+2", meta={"answer": "4"}), Prompted("2+3", meta={"answer": "5"})]}
    made = part.build("source", {"online-dpo": {"reward": "arithmetic"}}).obj
    found = made.round(inputs, policy=policy, round=0, rng=np.random.default_rng(0))
    assert [(e.prompt, e.chosen, e.rejected, e.margin) for e in found] == [
        ("2+2", "it is 4", "it is 5", 1.0), ("2+3", "it is 5", "it is 4", 1.0),
    ]  # fmt: skip


@pytest.mark.parametrize("order", ["nab", "anb", "abn"])
def test_answers_without_a_rating_make_no_pair(order):
    value = {"n": float("nan"), "a": 1.0, "b": 3.0}
    policy = Fake({"p": [(t, True) for t in order], "q": [("n", True), ("a", True)]})
    made = source(lambda p, c, a: np.array([[value[t] for t in row] + [0.0] * (3 - len(row)) for row in c]), number=3)
    found = made.round({"t": [Prompted("p"), Prompted("q")]}, policy=policy, round=0, rng=np.random.default_rng(0))
    assert [(e.chosen, e.rejected, e.margin) for e in found] == [("b", "a", 2.0)]
    nothing = Fake({"p": [("a", True), ("a", True), ("a", True)]})
    assert made.round({"t": [Prompted("p")]}, policy=nothing, round=0, rng=np.random.default_rng(0)) == []


def test_prompts_come_in_turn():
    policy = Fake({str(i): [("a", True), ("bb", True)] for i in range(5)})
    made, inputs = source(length, prompts=2), {"train": [Prompted(str(i)) for i in range(5)]}
    for r in range(3):
        made.round(inputs, policy=policy, round=r, rng=np.random.default_rng(r))
    assert [a[0] for a in policy.asked] == [["0", "1"], ["2", "3"], ["4", "0"]]


@pytest.fixture
def run():
    return {
        "model": "lab/words-sft", "objective": "dpo",
        "data": {"train": "lab/preferences", "format": "prompts", "limit": 40, "max_length": 64,
                 "source": {"online-dpo": {"reward": REWARD, "prompts": 12, "max_new_tokens": 24}}},
        "optimizer": {"adamw": {"lr": 1e-3}}, "schedule": "constant", "train": {"steps": 6, "batch": 4},
    }  # fmt: skip


def test_a_resumed_run_reads_its_rounds(tmp_path, run):
    whole = train(run, out=tmp_path / "whole", quiet=True)
    train({**run, "train": {**run["train"], "steps": 4}}, out=tmp_path / "parts", quiet=True)
    before = {p.name: p.read_text() for p in (tmp_path / "parts" / "rounds").iterdir()}
    rest = train(run, out=tmp_path / "parts", quiet=True)
    after = {p.name: p.read_text() for p in (tmp_path / "parts" / "rounds").iterdir()}
    assert before.items() <= after.items()
    assert rest.metrics["loss"] == pytest.approx(whole.metrics["loss"], abs=1e-6)
    rows = [json.loads(line) for text in after.values() for line in text.splitlines()]
    assert all(r["margin"] > 0 and r["chosen"] != r["rejected"] for r in rows)


def test_what_the_objective_cannot_read_is_refused(tmp_path, run):
    from metier.core.errors import UsageError

    with pytest.raises(UsageError, match="makes preference examples, but the objective reads"):
        train({**run, "objective": "lm"}, out=tmp_path / "a", quiet=True)


def test_its_run_is_evaluated_on_pairs(tmp_path, run):
    """The source reads prompts, the held-out data are pairs: of these it would use only the prompts."""
    from metier.core.evaluate import evaluate

    train({**run, "train": {"steps": 1, "batch": 2}}, out=tmp_path / "run", quiet=True)
    assert 0 <= evaluate(tmp_path / "run", data="lab/preferences-held-out", limit=8)["pair accuracy"] <= 1


def test_question_answer_rows_bring_right_answers(tmp_path):
    """A model of random weights writes numbers now and then; in every pair the chosen one is right, the rejected one is not."""
    rows = [{"question": f"Which digit is at {i}?", "answer": f"counted\n#### {i % 10}"} for i in range(24)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    own = {"reward": "arithmetic", "number": 32, "max_new_tokens": 6, "finished": False}
    run = {
        "model": "lab/llama-50k", "objective": "dpo", "data": {"train": str(data), "source": {"online-dpo": own}},
        "optimizer": {"adamw": {"lr": 1e-3}}, "schedule": "constant", "train": {"steps": 1, "batch": 4},
    }  # fmt: skip
    assert train(run, out=tmp_path / "run", quiet=True).step == 1
    made = [json.loads(line) for line in (tmp_path / "run" / "rounds" / "round-0001.jsonl").read_text().splitlines()]
    right = {r["question"]: final_number(r["answer"]) for r in rows}
    assert len(made) >= 4
    assert all(final_number(r["chosen"]) == right[r["prompt"]] != final_number(r["rejected"]) for r in made)
    assert all(r["margin"] == 1.0 for r in made)
