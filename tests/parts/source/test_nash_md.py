"""source/nash-md: answers of the policy against the mixture's, judged in both orders.

Bugs it is meant to catch: opponents from the policy, kappa on the wrong model, a judge's liking for a place, win rates of the
opponents instead of the answers, unfinished answers trained on.
"""

import numpy as np
import pytest
import torch
from _answering import build, check_resumes, prompted, prompts_file, rounds, rows_of, word_run
from _duels import Game, P, said

from metier.core.data.examples import Prompted
from metier.core.errors import UsageError
from metier.core.sample import sample
from metier.core.trained import open_run
from metier.lab import preferencebench, words
from metier.testing import check_part


def test_contract():
    check_part("source/nash-md")


def source(game, **options):
    made = build("nash-md", judge="length", **options)
    made.judge = type(made.judge)(game, made.judge.pairwise, made.judge.scale)
    return made


def test_win_rates_of_the_policys_answers_less_one_half():
    game = Game()
    policy = said(own=["rock", "paper"], others=["paper", "scissors", "scissors"])
    (made,) = rounds(source(game, pairwise=True, opponents=3, kappa=0.25), prompted(2), policy)
    rock = np.mean([P["rock", "paper"], P["rock", "scissors"], P["rock", "scissors"]]) - 0.5
    paper = np.mean([0.5, P["paper", "scissors"], P["paper", "scissors"]]) - 0.5
    for e in made:
        assert e.completions == ("rock", "paper")
        assert e.scores == pytest.approx((rock, paper))
    assert [(c["number"], c["mixed"]) for c in policy.calls] == [(2, 0.0), (3, 0.25)]
    assert [e.prompt for e in made] == ["p0", "p1"]


@pytest.mark.parametrize("bonus", [0.0, 0.2])
def test_a_liking_for_the_first_place_cancels(bonus):
    found = rounds(source(Game(bonus), pairwise=True), prompted(1), said(["rock", "rock"], ["paper"]))
    assert found[0][0].scores == pytest.approx([P["rock", "paper"] - 0.5] * 2)


def test_answers_that_read_the_same_are_even():
    found = rounds(source(Game(0.2), pairwise=True), prompted(1), said(["rock", "paper"], ["rock"]))
    assert found[0][0].scores == pytest.approx([0.0, P["paper", "rock"] - 0.5])


def test_a_reward_as_judge_is_a_sigmoid():
    def reward(prompts, completions, answers):
        return torch.tensor([[float(len(t)) for t in row] for row in completions])

    (made,) = rounds(source(reward, scale=0.5), prompted(1), said(["aaaa", "a"], ["aaa"]))
    assert made[0].scores == pytest.approx([1 / (1 + np.exp(-0.5)) - 0.5, 1 / (1 + np.exp(1.0)) - 0.5])


def test_right_answers_reach_the_judge():
    given = {"t": [Prompted("p", meta={"answer": "4"})]}
    (made,) = rounds(build("nash-md", judge="arithmetic"), given, said(["it is 4", "it is 5"], ["it is 6"]))
    assert made[0].scores == pytest.approx([1 / (1 + np.exp(-1.0)) - 0.5, 0.0])


def test_unfinished_answers():
    """They lose against those that ended, and are marked; empty ones are left out, prompts with fewer than two others too."""
    policy = said(own=["rock", ("paper", False), "scissors"], others=[("paper", False), "rock"])
    (made,) = rounds(source(Game(), pairwise=True, number=3, opponents=2), prompted(1), policy)
    assert made[0].completions == ("rock", "paper", "scissors")
    assert made[0].unfinished == (False, True, False)
    assert made[0].scores == pytest.approx([(1 + 0.5) / 2 - 0.5, (0.5 + 0) / 2 - 0.5, (1 + P["scissors", "rock"]) / 2 - 0.5])
    policy = said(own=["rock", (" ", False)], others=["rock"])
    assert rounds(source(Game(), pairwise=True), prompted(1), policy) == [[]]


def test_prompts_come_in_turn():
    found = rounds(source(Game(), pairwise=True, prompts=2), prompted(3), said(["rock", "paper"], ["rock"]), number=2)
    assert [[e.prompt for e in made] for made in found] == [["p0", "p1"], ["p2", "p0"]]


def test_unknown_judges_are_refused():
    with pytest.raises(UsageError, match="judge"):
        build("nash-md", judge="no-such-reward")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nash")
    options = {"judge": "length", "kappa": 0.5, "prompts": 8, "max_new_tokens": 24}
    made = word_run(prompts_file(folder), {"nash-md": options}, {"nash-md": {"tau": 0.05}}, steps=4, batch=4)
    return folder, made, check_resumes(made, folder, stop=3)


def test_two_rounds_resumed_in_the_second(run):
    folder, _, whole = run
    assert whole.status == "done"
    assert rows_of(folder / "whole", 1) != rows_of(folder / "whole", 2)
    for row in rows_of(folder / "whole", 1):
        assert row["format"] == "ranked"
        assert all(-0.5 <= s <= 0.5 for s in row["scores"])
        assert all(row["completions"])


def test_the_mixture_is_made_of_the_current_and_the_first_model(run, monkeypatch):
    """The second round's opponents, drawn here again from the two models themselves."""
    from metier import train
    from metier.core import policy as policies
    from metier.core.sample import Mixture

    folder, made, _ = run
    seen = []

    def spied(model, tokenizer, ids, **options):
        seen.append((ids, options, answers := sample(model, tokenizer, ids, **options)))
        return answers

    train({**made, "train": {**made["train"], "steps": 2}}, out=folder / "first", quiet=True)
    monkeypatch.setattr(policies, "sample", spied)
    train({**made, "train": {**made["train"], "steps": 4}}, out=folder / "first", quiet=True)
    ids, options, answers = seen[1]
    assert options["mixture"].share == 0.5
    monkeypatch.undo()
    first = {**made, "train": {**made["train"], "steps": 2}}
    train(first, out=folder / "again", quiet=True)
    current, start = open_run(folder / "again").bundle.model, preferencebench.sft().model
    how = {k: v for k, v in options.items() if k != "mixture"}
    tokenizer = preferencebench.sft().tokenizer

    def texts(model, mixture):
        return [[a.text for a in row] for row in sample(model, tokenizer, ids, **how, mixture=mixture)]

    shown = [[a.text for a in row] for row in answers]
    assert shown == texts(current, Mixture(start, 0.5))
    assert shown != texts(current, None)
    assert len(words.prompts(1)) == 1
