"""source/self-play: SPIN's pairs are the data's answer over the answer of the model as it is in that round.

Bugs it is meant to catch: chosen and rejected exchanged, answers of the initial model in later rounds, a reference that is
not the round's own model, answers that equal the data's or did not end.
"""

import json

import numpy as np
import pytest
from _answering import (
    FOLLOWED,
    LOG2,
    REWARD,
    Made,
    build,
    check_resumes,
    completed,
    completions_file,
    losses,
    losses_of_round,
    prompts_file,
    rounds,
    rows_of,
    word_run,
)

from metier import train
from metier.core.context import derive_seed
from metier.core.sample import sample
from metier.core.trained import open_run
from metier.lab import preferencebench, words
from metier.testing import check_part


def test_contract():
    check_part("source/self-play")


def test_the_datas_answer_is_chosen():
    (made,) = rounds(build("self-play"), completed(20), Made(lambda p, n, c: [f"mine {p}"]))
    assert sorted((e.prompt, e.chosen, e.rejected) for e in made) == sorted(
        (f"p{i}", f"data {i}", f"mine p{i}") for i in range(20)
    )
    assert [e.prompt for e in made] != [f"p{i}" for i in range(20)]


def test_what_is_left_out():
    says = {"p0": "data 0", "p1": " data 1 ", "p2": "", "p3": ("cut", False), "p4": "other"}
    (made,) = rounds(build("self-play"), completed(5), Made(lambda p, n, c: [says[p]]))
    assert [e.prompt for e in made] == ["p4"]
    (made,) = rounds(build("self-play", finished=False), completed(5), Made(lambda p, n, c: [says[p]]))
    assert {e.prompt for e in made} == {"p3", "p4"}


def test_prompts_in_turn_and_sampled_as_asked():
    policy = Made(lambda p, n, c: ["other"])
    found = rounds(build("self-play", prompts=3, temperature=0.5), completed(5), policy, number=3)
    assert [{e.prompt for e in made} for made in found] == [{"p0", "p1", "p2"}, {"p3", "p4", "p0"}, {"p1", "p2", "p3"}]
    assert [(c["number"], c["temperature"], c["top_p"]) for c in policy.calls] == [(1, 0.5, 1.0)] * 3
    assert len({c["seed"] for c in policy.calls}) == 3


@pytest.fixture(scope="module")
def spin(tmp_path_factory):
    folder = tmp_path_factory.mktemp("spin")
    run = word_run(completions_file(folder), {"self-play": {"max_new_tokens": 24}}, "dpo", hooks=[FOLLOWED], steps=6, batch=4)
    return folder, run, check_resumes(run, folder, stop=5)


def test_two_rounds_resumed_in_the_second(spin):
    folder, _, whole = spin
    assert whole.status == "done"
    assert rows_of(folder / "whole", 1) != rows_of(folder / "whole", 2)
    assert all(r["chosen"] != r["rejected"] for n in (1, 2) for r in rows_of(folder / "whole", n))


def test_the_reference_is_the_model_that_answered(spin):
    """At the first step of a round policy and reference are equal: log 2. A reference that stays would show its progress."""
    folder, run, whole = spin
    first = losses_of_round(whole, folder / "whole")
    assert losses(whole)[0] == pytest.approx(LOG2, abs=1e-6)
    assert losses(whole)[first] == pytest.approx(LOG2, abs=1e-6)
    assert abs(losses(whole)[first - 1] - LOG2) > 1e-3
    still = train({**run, "hooks": []}, out=folder / "still", quiet=True)
    assert losses(still)[:first] == losses(whole)[:first]
    assert abs(losses(still)[first] - LOG2) > 1e-3


def test_the_current_model_answers(spin):
    """Round 2 holds what the weights at the end of round 1 write, drawn again here without the source."""
    folder, run, whole = spin
    first = losses_of_round(whole, folder / "whole")
    train({**run, "train": {**run["train"], "steps": first}}, out=folder / "first", quiet=True)
    rows = [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]
    seed = int(np.random.default_rng(derive_seed(0, "source", 1)).integers(2**31))

    def pairs(bundle):
        ids = preferencebench.encode([r["prompt"] for r in rows])
        drawn = sample(bundle.model, bundle.tokenizer, ids, number=1, max_new_tokens=24, seed=seed, allow_empty=False)
        texts = [(r["prompt"], r["completion"], a.text) for r, (a,) in zip(rows, drawn, strict=True) if a.ended]
        return {t for t in texts if t[1] != t[2]}

    found = {(r["prompt"], r["chosen"], r["rejected"]) for r in rows_of(folder / "whole", 2)}
    assert found == pairs(open_run(folder / "first").bundle)
    assert found != pairs(preferencebench.sft())


def test_iterated_sppo(tmp_path):
    """source/online-dpo, objective/sppo and a reference that follows by rounds: η²/2 at the start of each round, resumed alike."""
    source = {"online-dpo": {"reward": REWARD, "number": 4, "max_new_tokens": 24}}
    run = word_run(prompts_file(tmp_path, 24), source, {"sppo": {"beta": 0.1}}, hooks=[FOLLOWED], steps=9, batch=4)
    whole = check_resumes(run, tmp_path, stop=8)
    first = losses_of_round(whole, tmp_path / "whole")
    assert losses(whole)[0] == pytest.approx(50.0, abs=1e-3)
    assert losses(whole)[first] == pytest.approx(50.0, abs=1e-3)
    assert abs(losses(whole)[first - 1] - 50.0) > 0.1
    value = {"good": 1, "bad": -1}
    for row in rows_of(tmp_path / "whole", 2):
        shown = [[value.get(words.sentiment(w), 0) for w in row[k].split()] for k in ("chosen", "rejected")]
        assert row["margin"] == pytest.approx(np.mean(shown[0]) - np.mean(shown[1]), abs=1e-6)
        assert row["margin"] > 0
