"""source/sami: constitutions, one answer under each, the format filter, and matrices whose diagonal is what was written.

Bugs it is meant to catch: equal constitutions, antitheses never drawn, a fixed order of principles, answers beside the
wrong constitution, equal or unfinished answers kept, contexts that cut the same answer at different places.
"""

from collections import Counter

import numpy as np
import pytest
from _answering import Made, answer, build, check_resumes, losses, prompted, rounds, rows_of, word_run, write

from metier.core.data.encode import Encoder
from metier.core.data.examples import Crossed, Message
from metier.core.errors import UsageError
from metier.lab import words
from metier.lab.wordmodel import word_tokenizer
from metier.parts.source.sami import constitutions, kept, under
from metier.testing import check_part

PRINCIPLES = [["brief", "long"], ["kind", "rude"], ["sure", "unsure"]]


def test_contract():
    check_part("source/sami")


def test_constitutions():
    rng = np.random.default_rng(0)
    sides, orders = Counter(), Counter()
    for _ in range(400):
        found = constitutions(PRINCIPLES, 2, 3, rng)
        assert all(len(c) == 3 for c in found)
        assert len({frozenset(c) for c in found}) == 2, "no two are the same"
        for c in found:
            assert all(sum(w in c for w in pair) == 1 for pair in PRINCIPLES), "each principle once, on one side"
        sides.update(w for c in found for w in c)
        orders[tuple(next(i for i, p in enumerate(PRINCIPLES) if w in p) for w in found[0])] += 1
    assert all(abs(n / 800 - 0.5) < 0.06 for n in sides.values())
    assert len(orders) == 6
    assert max(orders.values()) < 2 * 400 / 6


def test_all_constitutions_of_a_query_are_about_the_same():
    rng = np.random.default_rng(1)
    about = Counter()
    for _ in range(300):
        first, second = constitutions(PRINCIPLES, 2, 1, rng)
        pair = next(i for i, p in enumerate(PRINCIPLES) if first[0] in p)
        assert {*first, *second} == set(PRINCIPLES[pair])
        about[pair] += 1
    assert min(about.values()) > 60
    assert len({frozenset(c) for c in constitutions(PRINCIPLES, 8, 3, rng)}) == 8


def test_the_prompt_under_a_constitution():
    assert under("Hi {x}", ["a", "b"], "C: {constitution} | {prompt}", "; ") == "C: a; b | Hi {x}"
    turns = (Message("system", "s"), Message("user", "Hi"))
    assert under(turns, ["a"], "{constitution} {prompt}", "\n") == (Message("system", "s"), Message("user", "a Hi"))


@pytest.mark.parametrize(
    ("written", "markers", "expected"),
    [
        ([("a", True), ("b", True)], [], ("a", "b")),
        ([("a", True), ("a ", True)], [], None),
        ([("a", True), ("b", False)], [], None),
        ([("a", True), (" ", True)], [], None),
        ([("a\nHuman: c", False), ("b", True)], ["\nHuman:"], ("a", "b")),
        ([("a Q: c A: d", True), ("b", True)], ["A:", "Q:"], ("a", "b")),
        ([("a\nHuman: c", True), ("a", True)], ["\nHuman:"], None),
        ([("\nHuman: c", True), ("a", True)], ["\nHuman:"], None),
    ],
)  # fmt: skip
def test_format_filter(written, markers, expected):
    assert kept([answer(*w) for w in written], markers) == expected


def test_unfinished_answers_may_be_kept():
    assert kept([answer("a"), answer("b", False)], [], finished=False) == ("a", "b")


def test_each_answer_stands_at_the_prompt_it_was_written_for():
    policy = Made(lambda p, n, c: [f"to <{p}>"])
    source = build("sami", principles=PRINCIPLES, number=3, prompts=4)
    first, second = rounds(source, prompted(6), policy, number=2)
    for e in first + second:
        assert isinstance(e, Crossed)
        assert e.completions == tuple(f"to <{p}>" for p in e.prompts)
        assert len(set(e.prompts)) == 3
        assert all(p.endswith(f"\n\np{e.meta['row']}") for p in e.prompts)
    assert {e.meta["row"] for e in first} == {0, 1, 2, 3}
    assert {e.meta["row"] for e in second} == {4, 5, 0, 1}
    assert {e.prompts for e in first}.isdisjoint(e.prompts for e in second)


def test_identical_answers_are_dropped():
    says = lambda p, n, c: ["same"] if p.endswith("p1") else [p]
    (made,) = rounds(build("sami", principles=PRINCIPLES), prompted(3), Made(says))
    assert {e.meta["row"] for e in made} == {0, 2}


def test_wrong_options():
    for options, said in (
        ({"principles": [["a", "b"]], "number": 3}, "2 different constitutions"),
        ({"principles": [["a", "b"]], "size": 2}, "there are 1 principles"),
        ({"principles": [["a", "a"]]}, "its own antithesis"),
        ({"principles": [["a", "b"]], "template": "{prompt}"}, "must hold"),
        ({"principles": [["a"]]}, "principles"),
    ):
        with pytest.raises(UsageError, match=said):
            build("sami", **options)


def test_an_answer_is_never_cut_differently_under_different_constitutions():
    """All C² sequences of a query have the same answer whole, or the query is left out."""
    e = Crossed(("describe fox today firmly ?", "describe fox ?"), ("fox is red", "fox seems very old indeed"))
    tokenizer = word_tokenizer()
    lengths = [len(tokenizer(c)["input_ids"]) + 1 for c in e.completions]
    for limit in range(4, 14):
        for truncate in ("drop", "right", "left-prompt"):
            item = Encoder(tokenizer, max_length=limit, truncate=truncate, on_empty="drop")(e)
            if item is not None:
                assert [int(m.sum()) for m in item.answer_loss] == lengths * 2, (limit, truncate)


def test_two_rounds_resumed_in_the_second(tmp_path):
    """Control words are principles here; the loss begins near log 2 and the matrices carry the model's own answers."""
    data = write(tmp_path / "bare.jsonl", [{"prompt": p.removesuffix(" ?")} for p in words.prompts(24, 1, control=0.0)])
    source = {
        "principles": [["politely", "bluntly"], ["firmly", "cautiously"]], "size": 1, "template": "{prompt} {constitution} ?",
        "separator": " ", "max_new_tokens": 24,
    }  # fmt: skip
    run = word_run(data, {"sami": source}, "sami", steps=10, batch=4)
    whole = check_resumes(run, tmp_path, stop=8)
    assert 0.2 < losses(whole)[0] < 1.2
    for row in rows_of(tmp_path / "whole", 1):
        assert row["format"] == "crossed"
        assert len({p.split()[-2] for p in row["prompts"]}) == 2


def test_conversations_are_written_and_read_again(tmp_path):
    from metier.core.data import rounds as kept_rounds

    e = Crossed(((Message("user", "a"),), (Message("user", "b"),)), ("x", "y"))
    row = kept_rounds.to_row(e)
    assert row["prompts"] == [[{"role": "user", "content": "a"}], [{"role": "user", "content": "b"}]]
