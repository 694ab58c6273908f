"""Oracle of source/ultrafeedback: ratings worked out by hand, judges that are made up, rows as the authors released them.

Bugs it is meant to catch: ratings not brought back into the order of the answers, N/A counted as 0, tens repaired at the wrong
limit, one order for all rows or aspects, answers judged anew in every epoch, the system prompt of a principle kept in the pair.
"""

import json

import numpy as np
import pytest
from _answering import REWARD, Made, build, check_resumes, prompted, prompts_file, rounds, rows_of, word_run

from metier.core import part
from metier.core.data import formats
from metier.core.data.examples import Message, Preference, Prompted, Ranked
from metier.core.errors import UsageError
from metier.parts.source._pool import PRINCIPLES
from metier.parts.source._ratings import answered, fine_score, rate, repaired
from metier.testing import check_part

NAN = float("nan")
MINE = '''
CALLS = []


def letters(prompts, completions, answers):
    """Rates the letter a; writes down what it was shown."""
    CALLS.append([list(c) for c in completions])
    return [[c.count("a") for c in row] for row in completions]


def place(prompts, completions, answers):
    return [list(range(len(row))) for row in completions]


def truth(prompts, completions, answers):
    return [[float(c == a) for c in row] for row, a in zip(completions, answers)]


def ten(prompts, completions, answers):
    return [[10.0 if len(row) > 1 else 5.0 for c in row] for row in completions]


def some(prompts, completions, answers):
    return [[None if "n" in c else 1 for c in row] for row in completions]
'''


@pytest.fixture
def mine(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    return lambda name, **more: {"python": {"function": f"{path}:{name}", **more}}


def drawn(options, examples, seed=0, epochs=1):
    source = build("ultrafeedback", **options)
    made = [
        list(source.stream({"train": examples}, epoch=e, rng=np.random.default_rng([seed, e]), progress=lambda: 0.0))
        for e in range(epochs)
    ]
    return made[0] if epochs == 1 else made


def lists(number=10):
    return [Ranked(f"p{i}", ("b", "ab", "aab", "aaab"), (0.0,) * 4, id=f"f:{i}") for i in range(number)]


def test_contract():
    check_part("source/ultrafeedback")


# --- exact properties of the card ------------------------------------------------------------------------------------


def test_ratings_come_back_in_the_order_of_the_answers(mine):
    """(1)"""
    reward = part.build("reward", mine("letters")).obj
    texts = [["", "a", "aa", "aaa"]] * 24
    orders = [np.random.default_rng(s).permutation(4) for s in range(24)]
    assert len({tuple(o) for o in orders}) > 10
    for got in rate(reward, ["p"] * 24, texts, None, orders):
        assert got.tolist() == [0, 1, 2, 3]


def test_the_fine_score_is_the_mean_of_what_is_there():
    """(2)"""
    got = fine_score([[1, 5, NAN, 2], [2, 4, 3, NAN], [4, 3, NAN, NAN]])
    assert got.tolist() == [pytest.approx(7 / 3), 4, 3, 2]
    assert fine_score([[1, 2], [3, 5]]).tolist() == [2, 3.5]
    assert np.isnan(fine_score([[NAN], [NAN]])).all()


@pytest.mark.parametrize(
    ("overall", "fine", "expected"),
    [(10, 1.5, (1, False)), (10, 2, (1, False)), (10, 2.01, (10, True)), (10, 3, (10, True)), (10, 4, (10, True)),
     (10, 4.5, (10, False)), (9, 1, (9, False)), (10, NAN, (10, False)), (1, 1, (1, False))],
)  # fmt: skip
def test_repair(overall, fine, expected):
    """(3), with the limits as in the authors' release: at most 2, at most 4."""
    assert repaired(overall, fine) == expected


@pytest.mark.parametrize(("builder", "most"), [("top-random", 1), ("top-bottom", 1), ("all", 6)])
def test_numbers_of_pairs(mine, builder, most):
    """(4)"""
    made = drawn({"aspects": {"a": mine("letters")}, "builder": builder}, lists())
    assert len(made) == 10 * most
    assert all(e.chosen.count("a") - e.rejected.count("a") == e.margin > 0 for e in made)
    assert len({e.id for e in made}) == len(made)


# --- judging -----------------------------------------------------------------------------------------------------------


def test_each_aspect_sees_all_answers_in_an_order_of_its_own(mine):
    source = build("ultrafeedback", aspects={"x": mine("letters"), "y": mine("letters")})
    list(source.stream({"train": lists(30)}, epoch=0, rng=np.random.default_rng(0), progress=lambda: 0.0))
    shown = [source.judges[n].function.__globals__["CALLS"] for n in "xy"]
    (x,), (y,) = shown
    assert all(sorted(row) == sorted(lists()[0].completions) for row in x)
    assert len({tuple(row) for row in x}) > 10
    assert x != y


def test_rows_without_an_id_have_orders_of_their_own_too(mine):
    source = build("ultrafeedback", aspects={"x": mine("letters")})
    rows = [Ranked(f"p{i}", ("b", "ab", "aab", "aaab"), (0.0,) * 4) for i in range(30)]
    made = list(source.stream({"train": rows}, epoch=0, rng=np.random.default_rng(0), progress=lambda: 0.0))
    (shown,) = source.judges["x"].function.__globals__["CALLS"]
    assert len(shown) == len(made) == 30, "equal answers to another prompt are judged anew"
    assert len({tuple(row) for row in shown}) > 10


def test_a_liking_for_a_place_is_not_a_liking_for_an_answer(mine):
    """A judge that rates by place alone: the first answer of the row is chosen as often as others."""
    made = drawn({"aspects": {"place": mine("place")}, "builder": "top-bottom"}, lists(400))
    share = np.mean([e.chosen == "b" for e in made])
    assert abs(share - 0.25) < 4 * (0.25 * 0.75 / 400) ** 0.5


def test_answers_are_judged_once_in_a_run(mine):
    source = build("ultrafeedback", aspects={"a": mine("letters")})
    streams = [
        list(source.stream({"t": lists(5)}, epoch=e, rng=np.random.default_rng(e), progress=lambda: 0.0)) for e in range(3)
    ]
    assert sum(map(len, source.judges["a"].function.__globals__["CALLS"])) == 5
    assert len({tuple((e.id, e.rejected) for e in s) for s in streams}) > 1, "another epoch draws other rejected answers"


def test_aspects_are_averaged_and_missing_ratings_left_out(mine):
    made = drawn(
        {"aspects": {"a": mine("letters"), "s": mine("some", allow_missing=True)}, "builder": "all"},
        [Ranked("p", ("aaa", "n", "x"), (0, 0, 0), id="f:1")],
    )
    # fine: aaa (3+1)/2 = 2, n (0)/1 = 0, x (0+1)/2 = 0.5
    assert {(e.chosen, e.rejected, e.margin) for e in made} == {("aaa", "n", 2.0), ("aaa", "x", 1.5), ("x", "n", 0.5)}


def test_known_answers_reach_the_judge(mine):
    rows = [Ranked("p", ("4", "5"), (0, 0), id=f"f:{i}", meta={"answer": a}) for i, a in enumerate("45")]
    assert {(e.id[:3], e.chosen) for e in drawn({"aspects": {"t": mine("truth")}}, rows)} == {("f:0", "4"), ("f:1", "5")}


def test_one_aspect_can_be_taken(mine):
    options = {"aspects": {"a": mine("letters"), "place": mine("place")}, "by": "a", "builder": "top-bottom"}
    assert {(e.chosen, e.margin) for e in drawn(options, lists())} == {("aaab", 3.0)}


def test_pairs_are_judged_anew(mine):
    made = drawn({"aspects": {"a": mine("letters")}}, [Preference("p", "x", "aa", 3.0, id="f:1")])
    assert [(e.chosen, e.rejected, e.margin) for e in made] == [("aa", "x", 2.0)]


# --- recorded ratings --------------------------------------------------------------------------------------------------


def released(overall=(6, 10, 10, 10)):
    """A row with the keys of openbmb/UltraFeedback."""
    rated = [("5", "5"), ("1", "N/A"), ("4", "3"), ("5", "5")]
    completions = [
        {"response": f"r{k}", "overall_score": o, "annotations": {"helpfulness": {"Rating": h}, "honesty": {"Rating": t}}}
        for k, (o, (h, t)) in enumerate(zip(overall, rated, strict=True))
    ]
    return formats.convert({"prompt": "p", "completions": completions, "source": "flan"}, "prompts", id="f:1")


def test_rows_as_released():
    row = released()
    got = answered(row)
    assert got.texts == ("r0", "r1", "r2", "r3")
    np.testing.assert_array_equal(got.ratings["honesty"], [5, NAN, 3, 5])
    made = drawn({"builder": "all"}, [row])
    assert {(e.chosen, e.rejected, e.margin) for e in made} == {
        ("r0", "r1", 4.0), ("r0", "r2", 1.5), ("r2", "r1", 2.5), ("r3", "r1", 4.0), ("r3", "r2", 1.5),
    }  # fmt: skip
    assert {(e.chosen, e.rejected) for e in drawn({"by": "helpfulness", "margin": 4.0, "builder": "all"}, [row])} == {
        ("r0", "r1"),
        ("r3", "r1"),
    }


def test_overall_scores_are_repaired(mine):
    """r1 (10, fine 1) becomes 1, r2 (10, fine 3.5) is asked again or left out, r3 (10, fine 5) stays."""
    made = drawn({"by": "overall", "builder": "all"}, [released()])
    assert {(e.chosen, e.rejected, e.margin) for e in made} == {("r3", "r0", 4.0), ("r3", "r1", 9.0), ("r0", "r1", 5.0)}
    made = drawn({"by": "overall", "builder": "all", "overall": mine("ten")}, [released()])
    assert ("r2", "r1", 4.0) in {(e.chosen, e.rejected, e.margin) for e in made}
    assert ("r0", "r2", 1.0) in {(e.chosen, e.rejected, e.margin) for e in made}


def test_ratings_beside_texts_and_plain_scores():
    row = Prompted("p", id="f:1", meta={"completions": ["x", "y"], "ratings": {"a": [1, 3], "b": [None, 5]}})
    assert [(e.chosen, e.margin) for e in drawn({}, [row])] == [("y", 3.0)]
    assert [(e.chosen, e.margin) for e in drawn({}, [Ranked("p", ("x", "y"), (2.0, 1.5), id="f:1")])] == [("x", 0.5)]


def test_bad_rows_and_options(mine):
    for meta, why in [
        ({}, "no two completions"), ({"completions": ["a"]}, "no two"), ({"completions": [1, 2]}, "expected a text"),
        ({"completions": ["a", "b"], "ratings": {"x": [1]}}, "1 ratings of x"), ({"completions": ["a", "b"], "overall": [1]}, "1 overall"),
        ({"completions": ["a", "b"]}, "nobody is to judge"),
    ]:  # fmt: skip
        with pytest.raises(UsageError, match=why) as e:
            drawn({}, [Prompted("p", id="f:7", meta=meta)])
        assert e.value.where == "f:7"
    with pytest.raises(UsageError, match="no rating of depth"):
        drawn({"by": "depth"}, [released()])
    with pytest.raises(UsageError, match="neither fine"):
        build("ultrafeedback", aspects={"a": "length"}, by="b")
    with pytest.raises(UsageError, match="need judges"):
        build("ultrafeedback", sample=4)
    with pytest.raises(UsageError, match="principle"):
        build("ultrafeedback", aspects={"a": "length"}, sample=4, principles={"kindness": 1})
    with pytest.raises(UsageError, match="no temperature"):
        build("ultrafeedback", aspects={"a": "length"}, sample=4, temperatures=[])
    with pytest.raises(UsageError, match="reward"):
        build("ultrafeedback", aspects={"a": "lenght"})


# --- answers of the model ------------------------------------------------------------------------------------------------


def test_without_sampling_no_policy_is_needed():
    assert build("ultrafeedback", aspects={"a": "length"}).needs == frozenset()
    assert build("ultrafeedback", aspects={"a": "length"}, sample=2).needs == {"policy"}
    assert build("ultrafeedback", aspects={"a": "length"}, sample=2).takes == (Prompted,)


def test_the_pool_is_drawn_without_replacement():
    policy = Made(lambda p, n, c: [f"{p} {'word ' * c}"])
    source = build("ultrafeedback", aspects={"n": "length"}, sample=3, temperatures=[0.1, 0.5, 1.0, 2.0], builder="all")
    (made,) = rounds(source, prompted(40), policy)
    assert [c["temperature"] for c in policy.calls] == [0.1, 0.5, 1.0, 2.0]
    asked = [p for c in policy.calls for p in c["prompts"]]
    assert sorted(asked) == sorted([f"p{i}" for i in range(40)] * 3)
    assert all(len(set(c["prompts"])) == len(c["prompts"]) for c in policy.calls), "no member answers a prompt twice"
    assert len(made) == 40 * 3
    assert all(e.prompt in e.chosen for e in made)


def test_principles_are_told_to_the_model_and_not_kept():
    policy = Made(lambda p, n, c: [f"{p[1].content} {len(p[0].content) * 'x '}"])
    source = build(
        "ultrafeedback", aspects={"n": "length"}, sample=2, temperatures=[1.0, 1.0], principles={"honesty": 3, "truthfulness": 1}
    )
    (made,) = rounds(source, prompted(200), policy)
    told = [p[0] for c in policy.calls for p in c["prompts"]]
    assert all(m.role == "system" for m in told)
    counts = {n: sum(m.content in PRINCIPLES[n] for m in told) for n in PRINCIPLES}
    assert counts["helpfulness"] == counts["calibration"] == 0
    assert abs(counts["honesty"] - 300) < 4 * (400 * 3 / 16) ** 0.5
    assert all(isinstance(e.prompt, str) for e in made)


def test_unfinished_and_blank_answers_are_left_out():
    policy = Made(lambda p, n, c: [("long " * (c + 5), False) if p == "p0" else " " if p == "p1" else f"{'x ' * (c + 1)}"])
    (made,) = rounds(build("ultrafeedback", aspects={"n": "length"}, sample=2, temperatures=[1.0, 0.5]), prompted(3), policy)
    assert [e.prompt for e in made] == ["p2"]


def test_conversations():
    turns = (Message("system", "S"), Message("user", "u"))
    policy = Made(lambda p, n, c: [f"{'x ' * (c + 1)}"])
    source = build("ultrafeedback", aspects={"n": "length"}, sample=2, temperatures=[1.0, 0.5], principles={"honesty": 1})
    (made,) = rounds(source, {"t": [Prompted(turns, id="f:1")]}, policy)
    assert made[0].prompt == turns
    told = policy.calls[0]["prompts"][0]
    assert [m.role for m in told] == ["system", "user"]
    assert told[0].content.startswith("S\n\n")


# --- runs ----------------------------------------------------------------------------------------------------------------


def test_a_run_on_recorded_answers(tmp_path):
    from metier import train
    from metier.lab import wordpairs

    path = tmp_path / "lists.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in wordpairs.lists(24, 0)))
    run = word_run(str(path), {"ultrafeedback": {"aspects": {"sentiment": REWARD}}}, "dpo", steps=4)
    result = train(run, out=tmp_path / "run", quiet=True)
    assert result.step == 4


def test_a_run_that_answers_resumes(tmp_path):
    source = {
        "ultrafeedback": {"aspects": {"sentiment": REWARD}, "sample": 3, "temperatures": [0.7, 1.0, 1.3], "max_new_tokens": 24}
    }
    run = word_run(prompts_file(tmp_path, 24), source, "dpo", steps=4, batch=8)
    check_resumes(run, tmp_path, 3)
    assert all(r["margin"] > 0 for r in rows_of(tmp_path / "whole", 1))
