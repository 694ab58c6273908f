"""Rounds of sources that let the model answer: rows written and read, stale rounds, the end of the data, other models.

Bugs it is meant to catch: the old answer of a prompt's row over the new one, rounds of other settings used again, another
model that answers with the run's own weights.
"""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from metier import train
from metier.core.data import rounds
from metier.core.data.encode import Encoder
from metier.core.data.examples import Completion, Crossed, Judged, Message, Preference, Ranked
from metier.core.data.loader import Shape
from metier.core.engine import Engine
from metier.core.errors import UsageError
from metier.core.lossmodule import Pairs
from metier.core.models import load
from metier.core.policy import Policy


@pytest.mark.parametrize(
    "example",
    [
        Preference("p", "a", "b", 0.5, ("s", "t"), meta={"topic": "x"}),
        Preference((Message("system", "s"), Message("user", "u")), "a", "b"),
        Ranked("p", ("a", "b", "c"), (1.0, 2.0, 0.0)),
        Ranked("p", ("a", "b"), (1.0, 0.0), (False, True)),
        Judged("p", "a", False),
        Completion("p", "a"),
        Crossed(("p", "q"), ("a", "b")),
    ],
    ids=["pair", "conversation", "list", "list, one unfinished", "judged", "completion", "crossed"],
)  # fmt: skip
def test_an_example_is_read_as_it_was_written(tmp_path, example):
    path = rounds.place(tmp_path, 3)
    rounds._write(path, [example])
    (read,) = rounds.made(tmp_path, 3)
    assert vars(read) == vars(example) | {"id": "round-0004.jsonl:1"}
    assert rounds.number(read.id) == 4
    assert rounds.number("pairs.jsonl:7") == 0


def test_what_the_prompts_row_said_does_not_replace_the_answers():
    meta = {"chosen": "old", "score_chosen": 3.0, "score_rejected": 1.0, "samples": ["old"], "format": "x", "topic": "t"}
    row = rounds.to_row(Preference("p", "new", "other", meta=meta))
    assert row == {"format": "preference", "prompt": "p", "chosen": "new", "rejected": "other", "topic": "t"}


def test_empty_answers_are_left_out_and_said():
    made, left_out = rounds._usable(
        [Preference("p", "a", ""), Preference("p", "a", "b"), Preference("p", "a", "a"), Preference("q", "", "b")]
    )
    assert [(e.chosen, e.rejected) for e in made] == [("a", "b")]
    assert left_out == "1 left out (rejected is empty), 1 left out (chosen and rejected are equal), 1 left out (chosen is empty)"


def policy(folder):
    return SimpleNamespace(engine=Engine(torch.device("cpu"), "fp32", "ddp"), folder=folder, together=lambda work: work())


class Counting:
    """Makes a pair that says how often it was asked."""

    __metier__ = SimpleNamespace(id="source/counting")

    def __init__(self, last=9):
        self.calls, self.last = 0, last

    def round(self, inputs, *, policy, round, rng):
        self.calls += 1
        return None if round >= self.last else [Preference("p", f"call {self.calls}", "b")]


def drawn(source, folder, epoch):
    rng = np.random.default_rng(0)
    found = rounds.stream(source, {}, policy(folder), (Preference,), epoch=epoch, rng=rng, notice=lambda _: None)
    return [e.chosen for e in found]


def test_rounds_are_kept_only_with_a_checkpoint(tmp_path):
    source = Counting()
    assert drawn(source, tmp_path, 0) == ["call 1"]
    assert drawn(source, tmp_path, 1) == ["call 2"]
    assert drawn(source, tmp_path, 0) == ["call 3"], "nothing was trained on it: the settings may be others now"
    assert not rounds.place(tmp_path, 1).exists()
    (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
    assert drawn(source, tmp_path, 0) == ["call 3"]
    assert drawn(source, tmp_path, 1) == ["call 4"]
    assert drawn(source, tmp_path, 1) == ["call 4"]


def test_a_source_without_more_ends_the_data(tmp_path):
    assert drawn(Counting(last=1), tmp_path, 1) == []
    assert rounds.place(tmp_path, 1).read_text() == ""


# --- other models ----------------------------------------------------------------------------------------------------


def test_another_model_answers_and_scores_for_itself(tmp_path):
    from metier.core import engine as engines

    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps({"prompt": "a", "chosen": f"b {i}", "rejected": "c"}) + "\n" for i in range(8)))
    run = {
        "model": "lab/llama-50k", "data": {"train": str(data)}, "objective": "dpo", "optimizer": {"adamw": {"lr": 1e-2}},
        "train": {"steps": 3, "batch": 4},
    }  # fmt: skip
    train(run, out=tmp_path / "run", quiet=True)
    bundle, engine = load("lab/llama-50k"), engines.start("cpu", "fp32", "auto")
    encoder = Encoder(bundle.tokenizer, max_length=64, truncate="drop", on_empty="drop")
    own = Policy(bundle, engine, encoder, Shape(bundle.tokenizer.pad_token_id, 4096), tmp_path, Pairs)
    asked, answers = ["a", "b b"], [["b 1", "c"], ["d"]]
    tuned, same, folder = (own.other(w) for w in (str(tmp_path / "run"), "lab/llama-50k", str(tmp_path / "run" / "model")))
    for a, b, c, d in zip(*(p.logps(asked, answers) for p in (own, same, tuned, folder)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
        np.testing.assert_allclose(c, d, atol=1e-5)
        assert (np.abs(a - c) > 1e-3).all()
    texts = [[a.text for a in p.sample(asked, 2, max_new_tokens=8, seed=1)[0]] for p in (own, same, tuned)]
    assert texts[0] == texts[1]
    with pytest.raises(UsageError):
        own.other("lab/no-such-model")
