"""Oracle of source/constraint-pairs: a tree worked out by hand, a made-up policy over words, and runs on the word model.

Bugs it is meant to catch: a subtree's value without its parents, siblings that do not begin alike, the prior or the visits in the
wrong place of UCT, bands read the wrong way round, constraints that the prompt does not say, unfinished answers in pairs.
"""

import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from _answering import build, check_resumes, prompted, rounds, rows_of, word_run, write

from metier.core import constraints, models, part
from metier.core.data.examples import Message, Prompted
from metier.core.errors import UsageError
from metier.core.sample import Answer
from metier.lab import words
from metier.parts.source._candidates import Candidate, take
from metier.parts.source._pairs import matched
from metier.parts.source._tree import Node, Whole, back_up, cut, expand, nodes, selected, shared, siblings, uct
from metier.testing import check_part

GOOD = {"lexicon": {"good": [w for p in words.GOOD for w in p], "bad": [w for p in words.BAD for w in p]}}
WORDS = ["lovely", "kind", "ugly", "dull", "fox", "is"]


def test_contract():
    check_part("source/constraint-pairs")


# --- the tree ------------------------------------------------------------------------------------------------------------


def said(*ids, logp=-1.0, ended=True):
    return Answer(np.array(ids, np.int32), " ".join(map(str, ids)), ended, np.full(len(ids), logp, np.float32))


def grown():
    """A root with two children of two tokens; the second has two children of its own."""
    root = Node(np.zeros(0, np.int32))
    first = [said(1, 2, 3, logp=math.log(0.6)), said(4, 5, 6, 7, logp=math.log(0.2)), said(1, 2, 8, logp=math.log(0.2))]
    expand([root], first, [1.0, 0.5, 0.0], ["a", "b", "c"], [2, 2, 2], [True] * 3)
    low = root.children[1]
    expand([root, low], [said(6, 9), said(7)], [0.75, 0.25], ["d", "e"], [1, 1], [True, False])
    return root


def test_values_are_backed_up_to_all_ancestors():
    root = grown()
    high, low = root.children
    assert (root.visits, root.total) == (5, 2.5)
    assert (high.visits, high.value) == (2, 0.5)
    assert (low.visits, low.value) == (3, 0.5)
    assert [(c.visits, c.value) for c in low.children] == [(1, 0.75), (1, 0.25)]
    assert [w.text for w in high.wholes] == ["a", "c"]
    assert [w.text for w in root.wholes] == ["a", "b", "c", "d"], "an answer that did not end is no rollout"
    assert Node(np.zeros(0)).value == 0


def test_equal_segments_share_a_child_and_priors_are_shares_of_probability():
    root = grown()
    assert [c.ids.tolist() for c in root.children] == [[1, 2], [4, 5]]
    assert [c.prior for c in root.children] == pytest.approx([0.75, 0.25]), "a segment drawn twice has its probability once"
    assert [c.prior for c in root.children[1].children] == pytest.approx([0.5, 0.5])
    assert [c.ids.tolist() for c in root.children[1].children] == [[4, 5, 6], [4, 5, 7]]
    assert [c.done for c in root.children[1].children] == [False, True]


def test_uct_by_hand():
    child = Node(np.zeros(1), prior=0.25)
    back_up([child], 0.5)
    back_up([child], 1.0)
    assert uct(child, 9, 1.2) == pytest.approx(0.75 + 1.2 * 0.25 * 3 / 3)
    assert uct(Node(np.zeros(1), prior=0.5), 4, 1.0) == pytest.approx(0 + 0.5 * 2 / 1)


def test_selection_goes_to_the_leaf_with_the_highest_bound():
    root = grown()
    high, low = root.children
    bounds = [uct(n, 5, 1.2) for n in (high, low)]
    assert bounds[0] > bounds[1]
    assert selected(root, 1.2) == [root, high]
    for _ in range(6):
        back_up([root, high], 0.0)
    path = selected(root, 1.2)
    assert path[:2] == [root, low]
    assert path[2] is max(low.children, key=lambda n: uct(n, low.visits, 1.2))


def test_siblings_begin_alike():
    found = [(p.ids.tolist(), x.text, y.text) for p, x, y in siblings(grown())]
    assert found == []  # the root's children have equal values, and the only other parent has one rollout that ended
    root = grown()
    back_up([root, root.children[0]], 1.0, Whole(np.array([1, 2, 4]), "f", 1.0))
    found = {(len(p.ids), x.text, y.text) for p, x, y in siblings(root)}
    assert found == {(0, "a", "b"), (0, "a", "d"), (0, "f", "b"), (0, "f", "d")}
    for parent, x, y in siblings(root):
        assert shared(x.ids, y.ids) >= len(parent.ids)


def test_common_prefix():
    assert [shared(np.array(a), np.array(b)) for a, b in [([1, 2, 3], [1, 2, 4]), ([1], [1, 2]), ([], [1]), ([2], [1])]] == [
        2,
        1,
        0,
        0,
    ]


def test_segments_end_with_sentences_or_when_they_are_long():
    texts = ["", "It", "It is", "It is so.", "It is so. But"]
    decode = lambda ids: texts[len(ids)]
    assert cut(said(1, 2, 3, 4), decode, 16) == 3
    assert cut(said(1, 2, 3, 4), decode, 2) == 2
    assert cut(said(1, 2), decode, 16) == 2


# --- which pairs are taken -----------------------------------------------------------------------------------------------


def whole(score, name):
    return Whole(np.array([ord(c) for c in name]), name, score)


@pytest.mark.parametrize(
    ("better", "worse", "fits"),
    [
        (1, 0, {"any", "high"}), (1, 0.5, {"any", "high"}), (1, 2 / 3, {"any", "low"}), (0.75, 0.5, {"any", "low"}),
        (0.5, 0.25, {"any", "both-low"}), (1 / 3, 0, {"any", "both-low"}), (0.9, 0.2, {"any"}), (0.5, 0.5, set()),
        (np.float32(2 / 3), np.float32(1 / 3), {"any"}), (0, 1, set()),
    ],
)  # fmt: skip
def test_bands(better, worse, fits):
    c = Candidate(whole(float(better), "a"), whole(float(worse), "b"))
    assert {n for n in ("any", "high", "low", "both-low") if c.fits(n)} == fits
    assert not Candidate(whole(1, "a"), whole(0, "a")).fits("any")


def test_the_widest_gaps_are_taken_and_equal_ones_at_random():
    found = [Candidate(whole(s, "x"), whole(0, f"y{k}")) for k, s in enumerate([0.5, 1, 1, 0.25])] * 2
    firsts = Counter()
    for seed in range(200):
        taken = take(found, "any", 3, np.random.default_rng(seed))
        assert [c.gap for c in taken] == [1, 1, 0.5]
        assert len({c.worse.text for c in taken}) == 3
        firsts[taken[0].worse.text] += 1
    assert min(firsts["y1"], firsts["y2"]) > 60
    assert take([], "any", 3, np.random.default_rng(0)) == []


# --- a made-up policy ------------------------------------------------------------------------------------------------------


class Babbler:
    """Writes up to six random words and ends; continues what was begun."""

    def __init__(self, ended=True):
        self.bundle = SimpleNamespace(tokenizer=models.tokenizer_of("lab/words-sft"))
        self.ended, self.calls = ended, []

    def sample(self, prompts, number, *, max_new_tokens, seed, temperature=1.0, top_p=1.0, continued=None):
        self.calls.append((list(prompts), None if continued is None else [c.tolist() for c in continued], max_new_tokens))
        t = self.bundle.tokenizer
        out = []
        for i, _ in enumerate(prompts):
            begun = 0 if continued is None else len(continued[i])
            rng = np.random.default_rng([seed, i])
            row = []
            for _ in range(number):
                text = " ".join(rng.choice(WORDS, max(0, 6 - begun)))
                ids = np.array([*t(text, add_special_tokens=False)["input_ids"], t.eos_token_id], np.int32)
                row.append(Answer(ids, text, self.ended, np.full(len(ids), -1.0, np.float32)))
            out.append(row)
        return out


TREE = {
    "method": "tree",
    "least": 0,
    "most": 0,
    "reward": GOOD,
    "number": 3,
    "iterations": 12,
    "segment": 2,
    "max_new_tokens": 7,
    "pairs": 4,
}


def test_tree_pairs_share_at_least_their_parents_tokens():
    tokenizer = models.tokenizer_of("lab/words-sft")
    for prefix in (1, 2, 4):
        (made,) = rounds(build("constraint-pairs", **TREE, prefix=prefix), prompted(12), Babbler())
        assert len(made) > 12
        for e in made:
            a, b = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in (e.chosen, e.rejected))
            assert e.meta["shared"] == shared(np.array(a), np.array(b)) >= max(prefix, 2)
            assert e.meta["differ"] == [7 - e.meta["shared"]] * 2
            assert e.margin == pytest.approx(e.meta["scores"][0] - e.meta["scores"][1])
            assert e.margin > 0


def test_the_tree_continues_what_it_has():
    policy = Babbler()
    source = build("constraint-pairs", **TREE)
    roots = []
    original = source._grow
    source._grow = lambda asked, paths, *rest: (
        roots.extend(p[0] for p in paths if p[0] not in roots),
        original(asked, paths, *rest),
    )
    rounds(source, prompted(3), policy)
    assert policy.calls[0][1:] == ([[], [], []], 7)
    assert all(len(c[1]) == len(c[0]) for c in policy.calls)
    for root in roots:
        assert root.visits == sum(c.visits for c in root.children) > 12
        for node in nodes(root):
            for child in node.children:
                assert child.ids[: len(node.ids)].tolist() == node.ids.tolist()
                assert len(child.ids) <= len(node.ids) + 2
                assert all(w.ids[: len(child.ids)].tolist() == child.ids.tolist() for w in child.wholes)
        for parent, x, y in siblings(root):
            assert shared(x.ids, y.ids) >= len(parent.ids)
            assert x.score > y.score


def test_rejection_takes_the_best_and_the_worst():
    source = build("constraint-pairs", least=0, most=0, reward=GOOD, number=6)
    policy = Babbler()
    (made,) = rounds(source, prompted(20), policy)
    assert len(made) == 20
    answers = policy.sample(
        [f"p{i}" for i in range(20)], 6, max_new_tokens=1, seed=int(np.random.default_rng([0, 0]).integers(2**31))
    )
    reward = part.build("reward", GOOD).obj
    for e, row in zip(made, answers, strict=True):
        scores = reward(["x"], [[a.text for a in row]], None)[0]
        assert e.meta["scores"] == pytest.approx([float(scores.max()), float(scores.min())])


def test_both_ways_can_be_matched():
    from scipy.stats import ks_2samp

    tree, independent = (
        rounds(build("constraint-pairs", **{**TREE, "method": m}), prompted(40), Babbler())[0] for m in ("tree", "rejection")
    )
    a, b = matched(tree, independent, lambda e: tuple(np.round(e.meta["scores"], 6)))
    assert len(a) == len(b) >= 10
    for k in (0, 1):
        assert ks_2samp([round(e.meta["scores"][k], 6) for e in a], [round(e.meta["scores"][k], 6) for e in b]).statistic == 0


def test_unfinished_answers_make_no_pairs():
    for method in ("tree", "rejection"):
        assert rounds(build("constraint-pairs", **{**TREE, "method": method}), prompted(4), Babbler(ended=False)) == [[]]
        assert rounds(build("constraint-pairs", **{**TREE, "method": method}, finished=False), prompted(4), Babbler())[0]


def test_what_is_unfinished_or_too_long_is_a_visit_without_value():
    """Of three answers that only have good words one ended within the four tokens that are allowed."""
    source, policy = build("constraint-pairs", **{**TREE, "max_new_tokens": 4}), Babbler()
    tokenizer = policy.bundle.tokenizer

    def said_well(words, ended):
        ids = np.array([*tokenizer(words, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id], np.int32)
        return Answer(ids, words, ended, np.full(len(ids), -1.0, np.float32))

    answers = [said_well("lovely kind", True), said_well("kind lovely", False), said_well("kind lovely kind lovely", True)]
    policy.sample = lambda prompts, number, **more: [answers for _ in prompts]
    root = Node(np.zeros(0, np.int32))
    source._grow(prompted(1)["train"], [[root]], policy, np.random.default_rng(0))
    assert (root.visits, root.total) == (3, 1.0)
    assert [w.text for w in root.wholes] == ["lovely kind"]


def test_right_answers_reach_the_reward():
    source = build("constraint-pairs", least=0, most=0, reward="arithmetic", number=2)
    policy = Babbler()
    policy.sample = lambda prompts, number, **more: [
        [Answer(np.array([k]), f"it is {k}", True, np.zeros(1)) for k in (4, 5)] for _ in prompts
    ]
    found = [Prompted(f"p{k}", meta={"answer": str(k)}) for k in (4, 5)]
    (made,) = rounds(source, {"t": found}, policy)
    assert [(e.chosen, e.rejected) for e in made] == [("it is 4", "it is 5"), ("it is 5", "it is 4")]


def test_contrast_mixed_takes_turns():
    share = {"python": {"function": f"{__file__}:halves"}}
    options = {"least": 0, "most": 0, "reward": share, "number": 8, "contrast": "mixed"}
    (made,) = rounds(build("constraint-pairs", **options), prompted(20), Babbler())
    for e in made:
        even = int(e.prompt[1:]) % 2 == 0
        assert (e.meta["scores"][0] == 1 and e.meta["scores"][1] <= 0.5) if even else e.meta["scores"][1] >= 0.5


@pytest.mark.parametrize(("size", "expected"), [(1, "hlhlhl"), (3, "hlhlhl"), (2, "hlhlhl"), (6, "hlhlhl")])
def test_contrast_mixed_goes_on_in_the_next_round(size, expected, monkeypatch):
    """However many prompts a round has, high and low come in turn."""
    seen = []
    monkeypatch.setattr(
        "metier.parts.source.constraint_pairs.take", lambda found, contrast, number, rng: seen.append(contrast[0]) or []
    )
    source = build("constraint-pairs", least=0, most=0, reward=GOOD, contrast="mixed", prompts=size)
    rounds(source, prompted(6), Babbler(), number=6 // size)
    assert "".join(seen) == expected


def halves(prompts, completions, answers):
    """A reward in sixths: how many good words."""
    return [[min(1.0, sum(w in ("lovely", "kind", "fox", "is") for w in c.split()) / 4) for c in row] for row in completions]


# --- prompts ---------------------------------------------------------------------------------------------------------------


def test_prompts_get_constraints_within_the_limits():
    source = build("constraint-pairs", least=2, most=4)
    rng = np.random.default_rng(0)
    counts = Counter()
    for e in prompted(60)["train"]:
        made = source._constrained(e, rng)
        request, found = constraints.read(made.prompt)
        assert request == e.prompt
        assert len(found) == made.meta["constraints"]
        assert not any(constraints.conflicting(a, b) for i, a in enumerate(found) for b in found[:i])
        counts[len(found)] += 1
    assert set(counts) == {2, 3, 4}


def test_conversations_get_them_in_the_last_turn():
    turns = (Message("system", "S"), Message("user", "Say hi."))
    made = build("constraint-pairs", least=1, most=1, kinds=["no-commas"])._constrained(Prompted(turns), np.random.default_rng(0))
    assert made.prompt == (turns[0], Message("user", "Say hi.\nDo not use any commas."))


def test_the_default_reward_is_the_share_of_the_prompts_constraints():
    source = build("constraint-pairs", least=1, most=1, kinds=["lowercase"], number=2)
    policy = Babbler()
    policy.sample = lambda prompts, number, **more: [[said(1), said(2)] for _ in prompts]
    assert rounds(source, prompted(1), policy) == [[]]
    policy.sample = lambda prompts, number, **more: [
        [Answer(np.array([k]), t, True, np.zeros(1)) for k, t in enumerate(("Hi", "hi"))] for _ in prompts
    ]
    (made,) = rounds(source, prompted(1), policy)
    assert (made[0].chosen, made[0].rejected, made[0].margin) == ("hi", "Hi", 1.0)
    assert made[0].prompt.endswith("without capitals.")


def test_refusals():
    with pytest.raises(UsageError, match="least = 4 is above most = 2"):
        build("constraint-pairs", least=4, most=2)
    with pytest.raises(UsageError, match="kind of constraint"):
        build("constraint-pairs", kinds=["wordz"])
    with pytest.raises(UsageError, match="do not go together"):
        build("constraint-pairs", kinds=["uppercase", "lowercase"], most=2)


# --- runs --------------------------------------------------------------------------------------------------------------------


def test_what_was_begun_is_continued():
    """Greedy: the rest of an answer is the same when its beginning is given."""
    from metier.core import engine
    from metier.core.batch import Pairs
    from metier.core.data.encode import Encoder
    from metier.core.data.loader import Shape
    from metier.core.policy import Policy

    bundle = models.load("lab/words-sft")
    encoder = Encoder(bundle.tokenizer, max_length=64, truncate="error", on_empty="drop")
    policy = Policy(bundle, engine.start("cpu"), encoder, Shape(0, 4096), None, Pairs)
    prompts = words.prompts(4, 0)
    whole = [row[0] for row in policy.sample(prompts, 1, max_new_tokens=12, seed=0, temperature=0)]
    begun = [a.ids[:k] for k, a in enumerate(whole)]
    rest = [row[0] for row in policy.sample(prompts, 1, max_new_tokens=12, seed=0, temperature=0, continued=begun)]
    for a, b, r in zip(whole, begun, rest, strict=True):
        n = len(a.ids) - len(b)
        assert r.ids[:n].tolist() == a.ids[len(b) :].tolist()
        assert r.logps[:n] == pytest.approx(a.logps[len(b) :], abs=1e-4)


@pytest.mark.parametrize("method", ["rejection", "tree"])
def test_a_run_resumes(tmp_path, method):
    data = write(tmp_path / "prompts.jsonl", [{"prompt": p} for p in words.prompts(24, 0)])
    source = {"constraint-pairs": {**TREE, "method": method, "max_new_tokens": 24, "pairs": 1, "iterations": 3}}
    check_resumes(word_run(data, source, "dpo", steps=6), tmp_path, 4)
    for row in rows_of(tmp_path / "whole", 1):
        assert row["scores"][0] - row["scores"][1] == pytest.approx(row["margin"])
        if method == "tree":
            assert row["chosen"].split()[: row["shared"]] == row["rejected"].split()[: row["shared"]]
            assert row["shared"] >= 1
