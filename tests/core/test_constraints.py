"""Verifiable constraints: verdicts a reader would give, written down case by case, and sets that an answer can satisfy.

Bugs it is meant to catch: bounds off by one, parts of words counted as words, case, conflicts looked up in one direction only,
sentences that are read back as another constraint, blank answers that satisfy bans.
"""

import itertools

import numpy as np
import pytest

from metier.core.constraints import (
    BANNED,
    ENDS,
    KEYWORDS,
    KINDS,
    LANGUAGES,
    STARTS,
    Constraint,
    checks,
    compose,
    conflicting,
    draw,
    language,
    read,
    sentences,
)
from metier.core.errors import UsageError

REQUEST = "Name a river."
CASES = {
    "words": [
        ({"relation": "at least", "number": 3}, ["one two three", "Don't, well-known: yes it is"], ["one two", "well-known don't"]),
        ({"relation": "at most", "number": 3}, ["one two three", "a"], ["one two three four", "a b c d e"]),
        ({"relation": "exactly", "number": 2}, ["Hello, world!", "don't go"], ["Hello", "Hello you there"]),
    ],
    "sentences": [
        ({"relation": "exactly", "number": 2}, ["It is so. Is it?", 'He said "no." She left.'], ["It is so.", "One. Two. Three!"]),
        ({"relation": "at least", "number": 2}, ["Pi is 3.14. Yes!", "Title\n\nText"], ["Pi is 3.14 or 3.2", "P.S. that is all"]),
        ({"relation": "at most", "number": 1}, ["Just one here", "... Wait, what?"], ["A b. C d.", "Why? Because."]),
    ],
    "paragraphs": [
        ({"relation": "exactly", "number": 2}, ["a\n\nb", "a\nb\n \n\nc\n\n"], ["a\nb", "a\n\nb\n\nc"]),
    ],
    "include": [
        ({"words": ("river", "Light")}, ["Light on the river", "RIVER, light."], ["rivers of light", "the river is dark"]),
    ],
    "exclude": [
        ({"words": ("very", "nice")}, ["every niceness", "It is so"], ["Very well", "how nice!"]),
    ],
    "frequency": [
        ({"word": "time", "relation": "at least", "number": 2}, ["time after time", "Time. TIME! time?"], ["time", "times and sometime"]),
        ({"word": "time", "relation": "exactly", "number": 1}, ["my time", "sometimes it is time"], ["time, time", "timely"]),
        ({"word": "time", "relation": "at most", "number": 1}, ["time", "none of it"], ["time time", "time is time is time"]),
    ],
    "letters": [
        ({"letter": "e", "relation": "at least", "number": 3}, ["Eleven", "see me"], ["ten", "see"]),
        ({"letter": "z", "relation": "at most", "number": 1}, ["zoo", "none"], ["Zigzag", "fizz"]),
        ({"letter": "o", "relation": "exactly", "number": 2}, ["foo", "Oh no"], ["of", "oooh"]),
    ],
    "uppercase": [({}, ["HELLO 3!", "A"], ["Hello", "123"])],
    "lowercase": [({}, ["hello 3!", "a"], ["Hello", "123"])],
    "no-commas": [({}, ["no such thing", "a; b"], ["a, b", "1,000"])],
    "json": [
        ({}, ['{"a": 1}', '```json\n[1, 2]\n```', ' [{"b": null}] '], ["{a: 1}", 'Sure: {"a": 1}', "5", "{}", "[" * 100000]),
    ],
    "bullets": [
        ({"relation": "exactly", "number": 2}, ["* a\n* b", "Two:\n- a\n  * b\nend"], ["* a", "*a*\n* b", "* a\n* b\n* c"]),
    ],
    "highlights": [
        ({"number": 2}, ["*a* and *b c*", "**bold** and *it*"], ["*a*", "2 * 3 * 4 * 5", "* a\n* b"]),
    ],
    "sections": [
        ({"relation": "exactly", "number": 2}, ["Section 1\na\nSection 2\nb", "SECTION 1: a\n\nsection 2: b"],
         ["Section 1\na", "In Section 1 and\nsections 2", "Section 1\nSection 2\nSection 3"]),
    ],
    "title": [({}, ["<<My title>>\ntext", "text <<x>>"], ["<< >> text", "<title> text", "<<a\nb>>"])],
    "start": [({"word": "First of all"}, ["First of all, no.", "\nFIRST OF ALL we go"], ["So first of all", "First, of all"])],
    "end": [({"word": "That is all."}, ["Well. That is all.", "so that is all. \n"], ["That is all. Bye", "That is all"])],
    "quotation": [({}, ['"Hello there."', ' "a b" \n'], ['"Hello" he said', '""', '"', "'a b'", '" "'])],
    "postscript": [({}, ["Text.\nP.S. More", "Text\n\np. s. and so on"], ["Text PS more", "Text. P.S. more in the line", "Text\nP.S."])],
    "placeholders": [({"number": 2}, ["[name], [date of birth]", "[a][b][c]"], ["[name]", "[] [ ] (a) [b]"])],
    "two-responses": [
        ({}, ["One.\n******\nTwo.", "One\n\n ****** \n\nTwo"], ["One.\n******\n", "One\n******\nOne", "a\n******\nb\n******\nc", "a ****** b"]),
    ],
    "language": [
        ({"language": "German"}, ["Der Fluss ist nicht lang und die Stadt ist schön.", "Das ist ein Haus mit einem Garten"],
         ["The river is not long and the city is nice.", "Le fleuve est long et la ville est belle."]),
        ({"language": "French"}, ["Le fleuve est dans la ville et il est long.", "Je pense que les gens sont pour la paix"],
         ["Der Fluss ist lang", "Fleuve long ville belle"]),
    ],
    "repeat": [({}, ["Name a river. The Rhine.", "name a river.\nThe Nile"], ["The Rhine.", "Name a river.", "Sure! Name a river. The Rhine"])],
}  # fmt: skip


def test_there_are_23_kinds_and_each_has_cases():
    assert len(KINDS) == 23
    assert set(CASES) == set(KINDS)
    for name, rows in CASES.items():
        assert sum(len(good) for _, good, _ in rows) >= 2, name
        assert sum(len(bad) for _, _, bad in rows) >= 2, name


@pytest.mark.parametrize("kind", CASES)
def test_verdicts(kind):
    for arguments, good, bad in CASES[kind]:
        constraint = Constraint(kind, arguments)
        for text in good:
            assert constraint.holds(text, REQUEST), text
        for text in [*bad, "", " \n"]:
            assert not constraint.holds(text, REQUEST), text


def test_sentences_by_hand():
    assert len(sentences("Mr X (see p. 3) came. Then he left! P.S. He is back... 1. 2.")) == 4
    assert sentences("") == []


@pytest.mark.parametrize("name", LANGUAGES)
def test_frequent_words_tell_their_language(name):
    assert language(LANGUAGES[name]) == name
    assert language("qwerty asdf zxcv") is None


def test_repeat_needs_the_request():
    assert not Constraint("repeat").holds("anything", "")


# --- sentences -----------------------------------------------------------------------------------------------------


def samples(number=400, most=6):
    rng = np.random.default_rng(1)
    return [draw(rng, int(rng.integers(1, most + 1))) for _ in range(number)]


def test_prompts_are_read_back():
    for found in samples():
        prompt = compose("Tell me of a river, please. Use 5 words?", found)
        assert read(prompt) == ("Tell me of a river, please. Use 5 words?", found)
        assert prompt.startswith("Tell me of a river")
        assert all(c.text in prompt for c in found)


def test_a_prompt_without_constraints():
    assert read("Say hi.") == ("Say hi.", [])
    assert compose("Say hi.", []) == "Say hi."
    assert checks("Say hi.", "hi") == []


def test_checks_in_the_prompts_order():
    prompt = compose(
        "Say hi.", [Constraint("no-commas"), Constraint("words", {"relation": "at least", "number": 4}), Constraint("repeat")]
    )
    assert checks(prompt, "Say hi. Hi there") == [True, True, True]
    assert checks(prompt, "Hi, you") == [False, False, False]


def test_a_sentence_of_a_kind_is_of_no_other():
    rng = np.random.default_rng(0)
    for name, kind in KINDS.items():
        assert [c.kind for c in read("Do it. " + Constraint(name, kind.draw(rng)).text)[1]] == [name]


def test_bad_constraints_are_refused():
    with pytest.raises(UsageError, match="kind of constraint"):
        Constraint("wrods")
    with pytest.raises(UsageError, match="takes relation, number"):
        Constraint("words", {"number": 3})
    with pytest.raises(UsageError, match="cannot be put into words"):
        Constraint("words", {"relation": "about", "number": 3})
    with pytest.raises(UsageError, match="cannot be put into words"):
        Constraint("include", {"words": ('a"b',)})
    with pytest.raises(UsageError, match="do not go together"):
        draw(np.random.default_rng(0), 2, ["uppercase", "lowercase"])
    with pytest.raises(UsageError, match="kind of constraint"):
        draw(np.random.default_rng(0), 1, ["wrods"])


# --- conflicts -----------------------------------------------------------------------------------------------------


def test_no_drawn_set_contains_a_conflict():
    seen = set()
    for found in samples(1500):
        assert len({c.kind for c in found}) == len(found)
        for a, b in itertools.combinations(found, 2):
            assert b.kind not in KINDS[a.kind].conflicts
            assert a.kind not in KINDS[b.kind].conflicts
            words = [{w.lower() for w in c.arguments.get("words", ())} for c in (a, b)]
            if {a.kind, b.kind} == {"include", "exclude"}:
                assert not words[0] & words[1]
            seen |= {a.kind, b.kind}
    assert seen == set(KINDS)


def test_conflicts_hold_in_both_directions():
    rng = np.random.default_rng(0)
    for a, b in itertools.product(KINDS, KINDS):
        x, y = Constraint(a, KINDS[a].draw(rng)), Constraint(b, KINDS[b].draw(rng))
        assert conflicting(x, y) == conflicting(y, x)
        assert set(KINDS[a].conflicts) <= set(KINDS)
    assert conflicting(
        Constraint("include", {"words": ("river",)}),
        Constraint("frequency", {"word": "River", "relation": "at most", "number": 1}),
    )
    assert not conflicting(Constraint("include", {"words": ("river",)}), Constraint("exclude", {"words": ("light",)}))


def test_rare_letters_are_in_no_word_that_is_asked_for():
    assert not set("jqxz") & set("".join([*KEYWORDS, *STARTS, *ENDS]).lower())
    assert not set(BANNED) & {w for text in (*STARTS, *ENDS) for w in text.lower().split()}


def witness(found):
    """An answer built to satisfy all constraints, as somebody who reads them would."""
    wanted = {c.kind: c.arguments for c in found}
    tongue = wanted.get("language", {}).get("language")
    filler = ("the tea is hot" if tongue is None else " ".join(LANGUAGES[tongue].split()[:4])).split()
    if "letters" in wanted and wanted["letters"]["relation"] == "at least":
        filler = [wanted["letters"]["letter"] * 10, *filler]
    body = [list(wanted.get("include", {}).get("words", ())), [f"*{filler[0]} {k}*" for k in range(wanted.get("highlights", {}).get("number", 0))],
            [f"[{filler[0]}]" for _ in range(wanted.get("placeholders", {}).get("number", 0))], ["<<tea>>"] if "title" in wanted else []]  # fmt: skip
    line = [w for part in body for w in part]
    if "frequency" in wanted and wanted["frequency"]["relation"] != "at most":
        line += [wanted["frequency"]["word"]] * wanted["frequency"]["number"]
    least = wanted["words"]["number"] if wanted.get("words", {}).get("relation") == "at least" else 0
    line += filler * max(1, -(-least // len(filler)), 8 if "letters" in wanted else 1)
    if "json" in wanted:
        text = '{"a": "' + " ".join(line) + '"}' if "uppercase" not in wanted else '{"A": "' + " ".join(line) + '"}'
        return cased(text, wanted)
    blocks = [" ".join(([wanted["start"]["word"]] if "start" in wanted else []) + line)]
    lines = ["* " + " ".join(filler)] * wanted.get("bullets", {}).get("number", 0)
    lines += [f"Section {k + 1}" for k in range(wanted.get("sections", {}).get("number", 0))]
    blocks[0] = "\n".join([blocks[0], *lines])
    blocks += [" ".join(filler)] * (wanted.get("paragraphs", {}).get("number", 1) - 1)
    if "sentences" in wanted:
        need = wanted["sentences"]["number"] - len(blocks) if wanted["sentences"]["relation"] != "at most" else 0
        need -= "end" in wanted and len(blocks) > 0
        blocks[-1] += ". " + " ".join([" ".join(filler) + "."] * need) if need > 0 else "."
    if "two-responses" in wanted:
        blocks[-1] += f"\n******\n{filler[0]}"
        if wanted.get("sentences", {}).get("relation") == "exactly":
            blocks[-1] = blocks[-1].replace(" ".join(filler) + ".\n******", "\n******")
    if "postscript" in wanted:
        blocks[-1] += "\nP.S. " + filler[0]
        if wanted.get("sentences", {}).get("relation") == "exactly":
            blocks[-1] = blocks[-1].replace(" ".join(filler) + ".\nP.S.", "\nP.S.")
    if "end" in wanted:
        blocks[-1] += " " + wanted["end"]["word"]
    text = "\n\n".join(blocks)
    text = f"{REQUEST} {text}" if "repeat" in wanted else text
    return cased(f'"{text}"' if "quotation" in wanted else text, wanted)


def cased(text, wanted):
    return text.upper() if "uppercase" in wanted else text.lower() if "lowercase" in wanted else text


def test_every_two_kinds_that_may_be_combined_can_be_satisfied_together():
    rng = np.random.default_rng(0)
    tried = 0
    for a, b in itertools.combinations(KINDS, 2):
        for _ in range(12):
            found = [Constraint(k, KINDS[k].draw(rng)) for k in (a, b)]
            if not conflicting(*found):
                text = witness(found)
                assert [c.holds(text, REQUEST) for c in found] == [True, True], (found, text)
                tried += 1
    assert tried > 1500
