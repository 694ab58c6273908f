"""source/spa: seeds first, then pairs that the model labels by its implicit reward against the model at the start.

Bugs it is meant to catch: labels by log π alone, by the training's reference, or with the sign of the ratio exchanged; ties
kept; prompts used twice; seeds in later rounds; the last answers of K > 2 instead of best and worst.
"""

import json

import numpy as np
import pytest
from _answering import (
    FOLLOWED,
    LOG2,
    Made,
    build,
    check_resumes,
    losses,
    paired,
    pairs_file,
    prompted,
    prompts_file,
    rounds,
    rows_of,
    word_run,
    write,
)

from metier import train
from metier.core import models
from metier.core.data.encode import Encoder
from metier.core.errors import UsageError
from metier.core.klestimate import answer_stats
from metier.core.trained import open_run
from metier.lab import preferencebench, wordpairs
from metier.parts.source.spa import fitting, judged
from metier.testing import check_part


def test_contract():
    check_part("source/spa")


def test_best_and_worst_by_log_ratio():
    assert judged([-1.0, 2.0, 0.5, -3.0]) == (1, 3, 5.0)
    assert judged([0.0, 0.0]) is None
    assert judged([-4.0, -4.0 + 1e-6]) is None
    assert judged([1.0, 1.1])[:2] == (1, 0)


PI = {"w": -10.0, "x": -20.0, "y": -5.0, "z": -30.0}
MU = {"w": -11.0, "x": -29.0, "y": -4.0, "z": -30.5}
"""Log-ratios 1, 9, -1, 0.5; by π alone y would be best and z worst."""


def policy(says):
    return Made(says, logps=lambda p, a: PI[a], initial=lambda p, a: MU[a])


def test_labels_are_of_pi_over_mu():
    (made,) = rounds(build("spa", number=4), prompted(1), policy(lambda p, n, c: ["w", "x", "y", "z"]))
    (e,) = made
    assert (e.prompt, e.chosen, e.rejected, e.margin) == ("p0", "x", "y", None)
    assert e.meta == {"row": 0, "log_ratio_gap": 10.0}
    (made,) = rounds(build("spa"), prompted(1), policy(lambda p, n, c: ["w", "z"]))
    assert (made[0].chosen, made[0].rejected) == ("w", "z")
    (again,) = rounds(build("spa"), prompted(1), policy(lambda p, n, c: ["z", "w"]))
    assert again == made, "the order of sampling must not matter"


def test_seeds_come_first_and_prompts_once():
    seen = Made(lambda p, n, c: ["w", f"x{p}"], logps=lambda p, a: len(a), initial=lambda p, a: 0.0)
    inputs = {**paired(3, "seeds"), **{"prompts": prompted(5)["train"]}}
    found = rounds(build("spa", seed_epochs=2, prompts=2), inputs, seen, number=6)
    assert sorted(e.id for e in found[0]) == sorted(2 * [f"pairs:{i}" for i in range(3)])
    assert {e.id for e in found[0][:3]} == {f"pairs:{i}" for i in range(3)}, "an epoch of the seeds is whole"
    assert [None if r is None else {e.prompt for e in r} for r in found[1:]] == [{"p0", "p1"}, {"p2", "p3"}, {"p4"}, None, None]
    assert all(c["temperature"] == 0.7 and c["number"] == 2 for c in seen.calls)
    alone = rounds(build("spa", prompts=5), prompted(5), seen, number=2)
    assert [None if r is None else len(r) for r in alone] == [5, None]


def test_what_is_left_out():
    says = {"p0": ["w", "w"], "p1": ["w", ""], "p2": ["w", ("x", False)], "p3": ["w", "tie"], "p4": ["w", "x"]}
    scores = {**PI, "tie": -10.0}, {**MU, "tie": -11.0}
    seen = Made(lambda p, n, c: says[p], logps=lambda p, a: scores[0][a], initial=lambda p, a: scores[1][a])
    (made,) = rounds(build("spa"), prompted(5), seen)
    assert [e.prompt for e in made] == ["p4"]


def test_a_model_that_equals_its_start_labels_nothing(tmp_path):
    run = word_run(prompts_file(tmp_path), {"spa": {"max_new_tokens": 24}}, "spa", steps=2)
    with pytest.raises(UsageError, match="all pairs tie"):
        train(run, out=tmp_path / "run", quiet=True)
    same = Made(lambda p, n, c: ["w", "w"], logps=lambda p, a: 0.0, initial=lambda p, a: 0.0)
    with pytest.raises(UsageError, match="two different usable"):
        rounds(build("spa"), prompted(2), same)


@pytest.mark.parametrize("truncate", ["drop", "error", "right", "left-prompt"])
@pytest.mark.parametrize("finished", [True, False])
def test_what_does_not_fit_behind_its_prompt_is_no_answer(tmp_path, truncate, finished):
    """Prompts of like lengths leave a few tokens of ``data.max_length``; what is longer would end the run."""
    short = [r for r in wordpairs.pairs(64, 1) if max(_length(r, k) for k in ("chosen", "rejected")) <= 16]
    data = {"seeds": write(tmp_path / "pairs.jsonl", short[:16]), "prompts": prompts_file(tmp_path, 60)}
    assert len(short) >= 16
    own = {"seed_epochs": 2, "max_new_tokens": 40, "number": 4, "finished": finished}
    run = word_run(data, {"spa": own}, {"spa": {"window": 16}}, steps=9, batch=4)
    run["data"] |= {"max_length": 16, "truncate": truncate}
    train(run, out=tmp_path / "run", quiet=True)
    made = rows_of(tmp_path / "run", 2)
    longest = max(_length(r, k) for r in made for k in ("chosen", "rejected"))
    assert longest > 16 if truncate in ("right", "left-prompt") else 14 <= longest <= 16


def _length(row, key):
    """Tokens of the prompt and an answer with its end."""
    return len(preferencebench.encode([row["prompt"]])[0]) + len(preferencebench.encode([row[key]], end=True)[0])


def test_answers_that_cutting_makes_equal_are_none():
    encoder = Encoder(models.tokenizer_of("lab/words-sft"), max_length=4, truncate="right", on_empty="error")
    assert fitting(encoder, "the fox", ["is kind", "is ugly"]) == ["is kind", "is ugly"]
    assert fitting(encoder, "the fox", ["is kind today", "is kind"]) == []
    assert fitting(encoder, "the fox is", ["kind and happy", "kind and sad"]) == []
    assert fitting(encoder, "the fox is so kind", ["a", "b"]) == []
    assert (encoder.truncate, encoder.on_empty) == ("right", "error")


@pytest.fixture(scope="module")
def spa(tmp_path_factory):
    folder = tmp_path_factory.mktemp("spa")
    data = {"seeds": pairs_file(folder, 16), "prompts": prompts_file(folder, 40)}
    run = word_run(
        data, {"spa": {"seed_epochs": 2, "prompts": 20, "max_new_tokens": 24}}, {"spa": {"window": 16}}, hooks=[FOLLOWED],
        steps=8, batch=4,
    )  # fmt: skip
    run["train"]["steps"] = 12
    run["train"]["batch"] = 4
    return folder, run, check_resumes(run, folder, stop=10)


def test_two_rounds_resumed_in_the_second(spa):
    folder, run, whole = spa
    assert len(rows_of(folder / "whole", 1)) == 32
    assert losses(whole)[8] == pytest.approx(LOG2, abs=1e-6), "the reference is the model before the round"
    assert len(rows_of(folder / "whole", 2)) <= 20
    assert json.loads((folder / "whole" / "run.json").read_text())["run"]["data"]["source"] == run["data"]["source"]


def test_labels_agree_with_an_own_computation(spa):
    """The gaps in the file against log-ratios of another code path: the tuned model over the model at the start."""
    folder, run, _ = spa
    train({**run, "train": {**run["train"], "steps": 8}}, out=folder / "first", quiet=True)
    bundle = open_run(folder / "first").bundle
    rows = rows_of(folder / "whole", 2)
    both = [preferencebench.encode([r[k] for r in rows], end=True) for k in ("chosen", "rejected")]
    prompts = preferencebench.encode([r["prompt"] for r in rows])
    stats = answer_stats(
        bundle.model, preferencebench.sft().model, prompts, list(zip(*both, strict=True)), bundle.tokenizer.pad_token_id
    )
    gap = stats["kl_mc"][:, 0] - stats["kl_mc"][:, 1]
    np.testing.assert_allclose(gap, [r["log_ratio_gap"] for r in rows], atol=1e-3)
    assert (gap > 0).all()


def test_the_run_ends_with_its_prompts(spa, tmp_path):
    _, run, _ = spa
    few = {**run["data"], "train": {**run["data"]["train"], "prompts": prompts_file(tmp_path, 8)}}
    result = train({**run, "data": few, "train": {**run["train"], "steps": 50}}, out=tmp_path / "run", quiet=True)
    assert result.status == "ended"
    assert result.step == (32 + len(rows_of(tmp_path / "run", 2))) // 4
    assert rows_of(tmp_path / "run", 3) == []
