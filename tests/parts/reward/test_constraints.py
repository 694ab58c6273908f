"""Oracle of reward/constraints: shares of constraints kept, counted by hand.

Bugs it is meant to catch: strict read as any instead of all, constraints of the wrong prompt, the request taken with its
constraints for *repeat*, blank answers rewarded for keeping bans.
"""

import pytest

from metier.core import part
from metier.core.constraints import Constraint, compose
from metier.core.data.examples import Message
from metier.core.errors import UsageError
from metier.testing import check_part

FOUR = Constraint("words", {"relation": "at least", "number": 4})
PLAIN = Constraint("no-commas")
SMALL = Constraint("lowercase")
AGAIN = Constraint("repeat")


def reward(**options):
    return part.build("reward", {"constraints": options}).obj


def test_contract():
    check_part("reward/constraints")


PROMPTS = [compose("Say hi.", [FOUR, PLAIN, SMALL]), compose("Name a river.", [AGAIN])]
ANSWERS = [
    ["hi you there friend", "Hi, you there friend", "hi", ""],
    ["name a river. Rhine", "Rhine", " ", "Name a river. the Po"],
]


def test_soft_is_the_share():
    got = reward()(PROMPTS, ANSWERS, None)
    assert got.tolist() == [pytest.approx([1, 1 / 3, 2 / 3, 0]), [1, 0, 0, 1]]


def test_strict_is_all_or_nothing():
    assert reward(mode="strict")(PROMPTS, ANSWERS, None).tolist() == [[1, 0, 0, 0], [1, 0, 0, 1]]


def test_constraints_of_the_option_come_on_top():
    of = [{"kind": "no-commas"}, {"kind": "include", "words": ["rhine", "po"]}]
    assert reward(of=of)(["Name a river."], [["Rhine", "Rhine and Po", "Rhine, Po", "Rhine, Elbe"]], None).tolist() == [
        [0.5, 1, 0.5, 0]
    ]
    assert reward(of=of)(PROMPTS[1:], [["Name a river. Rhine and Po"]], None).tolist() == [[1]]
    assert reward(of=of, mode="strict")(PROMPTS[1:], [["Name a river. Rhine, Po"]], None).tolist() == [[0]]


def test_prompts_without_constraints():
    with pytest.raises(UsageError, match="names no constraint"):
        reward()(["Say hi."], [["hi"]], None)
    assert reward(without=0.5)(["Say hi.", PROMPTS[1]], [["hi"], ["x"]], None).tolist() == [[0.5], [0]]
    assert reward(without=0.5, mode="strict")(["Say hi."], [["hi"]], None).tolist() == [[0.5]]


def test_the_request_of_a_conversation_is_its_last_turn():
    """What is to be repeated is not the system prompt; through the sources' way of asking too."""
    from metier.parts.source._pairs import judged

    talk = (Message("system", f"Be nice. {PLAIN.text}"), Message("user", compose("Say hi.", [AGAIN])))
    answers = [["Say hi. Hi there", "Say hi. Hi, you", "Hi there", "Be nice. Hi"]]
    assert reward()([talk], answers, None).tolist() == [[1, 0.5, 0.5, 0.5]]
    assert judged(reward(), [talk], answers, None)[0].tolist() == [1, 0.5, 0.5, 0.5]
    assert reward()([talk[1:]], answers, None).tolist() == reward()([talk[1].content], answers, None).tolist()


def test_refusals():
    with pytest.raises(UsageError, match="kind of constraint"):
        reward(of=[{"kind": "comma"}])(["x"], [["y"]], None)
    with pytest.raises(UsageError, match="has no kind"):
        reward(of=[{"number": 3}])(["x"], [["y"]], None)


def test_ragged():
    assert reward()(PROMPTS, [["hi you there friend"], ["name a river. Rhine", "no"]], None).tolist() == [[1, 0], [1, 0]]
