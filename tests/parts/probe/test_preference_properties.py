"""probe/preference-properties: what is planted in texts and columns is found, by whoever judges.

Bugs it is meant to catch: rejected minus chosen, errors that count as merits, a judge asked in one order only, the wrong pairs
decoded from rows, words counted inside words.
"""

import json

import numpy as np
import pytest
import torch
from scipy import special

from metier.core import models, part
from metier.core.config import load
from metier.core.data.examples import Message, Preference
from metier.core.errors import UsageError
from metier.core.probing import probe_session
from metier.core.session import open_session
from metier.lab import wordpairs
from metier.parts.probe import _judges as judges
from metier.parts.probe import _preferences as preferences
from metier.parts.probe import _properties as properties
from metier.testing import check_part
from metier.testing.probe import tiny_probe

QUICK = {"bootstrap": 0, "draws": 0}


def probed(where=None, probe=None, **options):
    return part.build("probe", {"preference-properties": {**QUICK, "data": where, **options}}).obj(probe or tiny_probe())


def by_name(found, key="alpha"):
    return {r["property"]: r[key] for r in found["properties"]}


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return str(path)


def test_contract():
    check_part("probe/preference-properties")


# --- properties of texts ---------------------------------------------------------------------------------------------

TEXTS = {
    "length": ("one two three", 3), "questions": ("What? Why?", 2), "exclamations": ("Yes! Yes! Yes!", 3),
    "numbers": ("3 apples and 12.5", 3), "lists": ("Do:\n- a\n2. b\n* c\nx - y", 3), "formatting": ("# T\n**b** and `c`\n", 3),
    "hedging": ("maybe it may rain maybe", 3 / 5), "politeness": ("Please, thanks a lot", 2 / 4), "first person": ("I'm me", 1.0),
    "second person": ("you said your", 2 / 3), "sentiment": ("good good bad day", 0.25), "long words": ("ab abcd", 3.0),
    "long sentences": ("One two. Three four five six.", 3.0), "non-repetitive": ("a b c a b c", 3 / 4 - 1),
    "admits limits": ("As an AI, I'm sorry, I can't.", 3), "supporting material": ("For example https://x.y [1]", 3),
    "paragraphs": ("a\n\nb\n \nc", 2), "quotations": ('"a" and “b”', 3), "relevant": ("the brown bear", 0.5), "steps": ("Then next x y", 0.5),
    "certainty": ("never say always", 2 / 3), "formality": ("thus however x", 2 / 3), "informality": ("hey dude what up", 0.5),
    "empathy": ("I understand", 0.5),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(properties.CATALOGUE))
def test_every_property_by_hand(name):
    text, value = TEXTS[name]
    assert (
        properties.CATALOGUE[name]("Is the bear old? Is brown cats", text) == pytest.approx(value, abs=1e-12)
        or name == "relevant"
    )
    assert np.isfinite(properties.CATALOGUE[name]("", ""))
    if name == "relevant":
        assert properties.CATALOGUE[name]("the brown cats", text) == value


def test_words_are_whole_words():
    assert properties.words("Maybe-not: it’s “fine”, 2x") == ["maybe", "not", "it's", "fine", "2x"]
    assert properties.CATALOGUE["hedging"]("", "mayor mightily") == 0


def pair(chosen, rejected, **meta):
    return Preference("ask", chosen, rejected, meta=meta)


def test_differences_are_signs_of_chosen_minus_rejected():
    found = [pair("a b c", "a", errors_chosen=2, errors_rejected=5), pair("a!", "a b", errors_chosen=1, errors_rejected=1)]
    d, names, kept = properties.differences(found, ["length", "exclamations"], ["-errors", "errors"])
    assert names == ["length", "exclamations", "-errors", "errors"]
    assert d.tolist() == [[1, 0, 1, -1], [-1, 1, 0, 0]]
    assert kept.all()
    raw, *_ = properties.differences(found, ["length"], [], "standardised")
    np.testing.assert_allclose(raw[:, 0], np.array([2, -1]) / np.sqrt(2.5))


def test_pairs_without_a_column_are_left_out(tmp_path):
    found = [pair("a", "b", x_chosen=1, x_rejected=0), pair("a", "c"), pair("a", "d", x_chosen=True, x_rejected=False)]
    d, _, kept = properties.differences(found, [], ["x"])
    assert kept.tolist() == [True, False, True]
    assert d.tolist() == [[1], [1]]
    with pytest.raises(UsageError, match="qualty_chosen") as raised:
        properties.differences([pair("a", "b", quality_chosen=1, quality_rejected=2)], [], ["qualty"])
    assert raised.value.hint == "Did you mean 'quality'?"
    with pytest.raises(UsageError, match="politeness"):
        properties.differences(found, ["politness"], [])


# --- fits ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Pairs chosen by questions (+1), exclamation marks (-0.7) and a column (0.8), not by numbers; two groups."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(3000):
        sides = []
        for _ in range(2):
            q, e, n, x = rng.integers(0, 3, 4)
            sides.append(("word " * int(rng.integers(1, 6)) + "?" * q + "!" * e + " 7" * n, int(q), int(e), int(x)))
        (a, qa, ea, xa), (b, qb, eb, xb) = sides
        if a.strip() == b.strip():
            continue
        sign = 1 if i % 3 else -1  # the second group likes questions less than nothing
        z = sign * np.sign(qa - qb) - 0.7 * np.sign(ea - eb) + 0.8 * np.sign(xa - xb)
        if rng.random() >= special.expit(z):
            (a, xa), (b, xb) = (b, xb), (a, xa)
        rows.append({"prompt": f"p{i % 500}", "chosen": a, "rejected": b, "x_chosen": xa, "x_rejected": xb,
                     "kind": "more" if i % 3 else "less"})  # fmt: skip
    return write(tmp_path_factory.mktemp("planted") / "pairs.jsonl", rows)


def test_planted_weights_are_found(planted):
    found = probed(
        planted,
        properties=["questions", "exclamations", "numbers", "length"],
        columns=["x"],
        group="kind",
        bootstrap=40,
        draws=60,
    )
    alpha = by_name(found)  # of both groups together, so the effects that they share look smaller than they are
    assert -0.85 < alpha["exclamations"] < -0.45
    assert 0.5 < alpha["x"] < 0.95
    assert abs(alpha["numbers"]) < 0.1 > abs(alpha["length"])
    assert by_name(found["groups"]["more"])["x"] == pytest.approx(0.8, abs=0.15)
    more, less = (by_name(found["groups"][g]) for g in ("more", "less"))
    assert more["questions"] == pytest.approx(1.0, abs=0.2)
    assert less["questions"] == pytest.approx(-1.0, abs=0.25)
    for row in found["properties"]:
        assert row["low"] <= row["alpha"] <= row["high"]
        assert row["mean"] == pytest.approx(row["alpha"], abs=0.05)
        assert row["preference"] == pytest.approx(special.expit(row["mean"]))
        assert (row["without_length"] is None) == (row["property"] == "length")
    assert found["sampler"]["rhat"] < 1.1
    assert found["explained"] > 0.05
    assert found["warnings"] == []


def test_a_small_data_set_is_warned_of(planted):
    found = probed(planted, properties=["questions"], limit=50, group="kind")
    assert "only 50 pairs" in found["warnings"][0]
    assert found["groups"] == {}
    assert sum(found["small_groups"].values()) == 50


# --- judges ----------------------------------------------------------------------------------------------------------


def test_a_reward_as_judge(planted):
    found = probed(planted, properties=["questions", "length"], judge="length", limit=600)
    alpha = by_name(found)
    assert alpha["length"] > 1 > abs(alpha["questions"])
    assert 0.3 < found["agrees_with_data"] < 0.7


def test_judges_are_asked_in_both_orders(tmp_path):
    file = tmp_path / "judge.py"
    file.write_text(
        "def prefer(prompts, completions, answers):\n    return [[0.6 + 0.1 * (len(a) - len(b)), 0.0] for a, b in completions]\n"
    )
    found = [pair("aa", "a"), pair("a", "aaa"), pair("ab", "cd")]
    judge = {"python": {"function": f"{file}:prefer"}}
    assert judges.by_reward(judge, found, pairwise=True).tolist() == [1.0, 0.0, 0.5]
    sums = [pair("it is 4", "it is 5", answer="4"), pair("it is 4", "it is 5", answer="5")]
    assert judges.by_reward("arithmetic", sums, pairwise=False).tolist() == [1.0, 0.0]
    lengths = [pair("a a", "a"), pair("a", "a a a"), pair("b", "a")]
    assert judges.by_reward("length", lengths, pairwise=False).tolist() == [1.0, 0.0, 0.5]


def test_conversations_reach_rewards_that_take_them():
    """A reward model reads turns by its template, as it was trained, not all of them as one turn."""
    turns = (Message("system", "be kind"), Message("user", "hello"))
    reward = part.build("reward", {"reward-model": {"model": "lab/llama-50k", "device": "cpu"}}).obj
    found = [Preference(turns, "x y", "z"), Preference("plain", "x", "y")]
    assert judges.asked(reward, found) == [turns, "plain"]
    assert judges.asked(part.build("reward", "length").obj, found) == ["be kind\n\nhello", "plain"]
    own, text = (reward([p], [["x y", "z"]], None)[0] for p in (turns, "be kind\n\nhello"))
    assert not torch.allclose(own, text)
    judge = {"reward-model": {"model": "lab/llama-50k", "device": "cpu"}}
    assert judges.by_reward(judge, found[:1], pairwise=False).tolist() == [float(own[0] > own[1])]


def test_two_judges_are_too_many(planted):
    with pytest.raises(UsageError, match="each name a judge"):
        probed(planted, judge="length", judge_model="lab/llama-50k")
    with pytest.raises(UsageError, match="own pairs"):
        probed(planted, labels="run")
    with pytest.raises(UsageError, match="no preference pairs"):
        probed()


def test_letters_of_a_language_model():
    """Probabilities of A and B after the question, against a plain forward pass of each prompt alone."""
    bundle = models.load("lab/llama-50k", seed=3)
    with torch.no_grad():
        for p in bundle.model.parameters():
            p.mul_(2)
    found = [pair("yes it is", "no"), pair("one", "two three four")]
    straight, turned = judges.by_letters(bundle, found, batch=3)
    tokenizer = bundle.tokenizer
    for table, order in ((straight, ("chosen", "rejected")), (turned, ("rejected", "chosen"))):
        for e, seen in zip(found, table, strict=True):
            a, b = (getattr(e, k) for k in order)
            question = judges.QUESTION.format(prompt="ask", a=a, b=b)
            turn = [{"role": "user", "content": question}]
            text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) + judges.LEAD
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            p = bundle.model(input_ids=torch.tensor([ids])).logits[0, -1].double().softmax(0)
            letters = [tokenizer(text + x, add_special_tokens=False)["input_ids"][-1] for x in (" A", " B")]
            np.testing.assert_allclose(seen, p[letters].detach(), rtol=1e-4)


def test_letters_that_are_no_single_tokens_are_refused():
    with pytest.raises(UsageError, match="no single token"):
        judges._letter(lambda text, **_: {"input_ids": [ord(c) for c in text]}, "x", " A")


# --- pairs of a run --------------------------------------------------------------------------------------------------


@pytest.fixture(params=["dpo", "bradley-terry"])
def session_probe(request, tmp_path):
    rows = wordpairs.pairs(40, 3)
    run, document = load(
        {
            "model": "lab/words-120k", "objective": request.param, "train": {"steps": 5, "batch": 40},
            "data": {"train": write(tmp_path / "p.jsonl", rows), "max_length": 64, "shuffle": False},
        }
    )  # fmt: skip
    with open_session(run, document, tmp_path / "run", quiet=True, handle_signals=False) as session:
        yield rows, probe_session(session, on="train", batches=1), session


def test_pairs_of_a_run_are_decoded(session_probe):
    rows, probe, _ = session_probe
    found = preferences.pairs(probe, None, None)
    assert {(e.prompt, e.chosen, e.rejected) for e in found} <= {(r["prompt"], r["chosen"], r["rejected"]) for r in rows}
    assert len(found) >= 8


def test_the_run_as_judge(session_probe):
    _, probe, _ = session_probe
    found = preferences.pairs(probe, None, None)
    y = judges.choices(probe, found, labels="run", judge=None, pairwise=False, judge_model=None, given=False)
    module = getattr(probe.module, "module", probe.module)
    gaps = []
    for layout in probe.layouts:
        with torch.no_grad():
            _, units, metrics = module(layout)
        gaps.append((float(metrics["accuracy"]), units))
    assert y.sum() == pytest.approx(sum(a for a, _ in gaps))
    assert len(y) == sum(n for _, n in gaps)


def test_conversations_as_text():
    turns = (Message("system", "be kind"), Message("user", "hello"))
    assert preferences.said(turns) == "be kind\n\nhello"
