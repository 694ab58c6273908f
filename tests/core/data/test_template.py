"""Oracle of core/data/template: the stretches a model learns to write, worked out by hand for several templates (F19, P10).

Bugs it is meant to catch: a header inside the loss, the end-of-turn token outside it, what follows it inside, later turns
shifted, templates that rewrite earlier turns trusted.
"""

import pytest
import templates as t

from metier.core.data.formats import Message
from metier.core.data.template import Segment, render, segments
from metier.core.errors import UsageError

SYSTEM, ASK, ANSWER = Message("system", "s"), Message("user", "a"), Message("assistant", "b")
TWO = (ASK, ANSWER, Message("user", "c"), Message("assistant", "d"))


def learnt(template, messages, **options):
    return [s.text for s in segments(t.tokenizer(template), messages, **options) if s.loss]


@pytest.mark.parametrize("template", [t.TEMPLATE, t.PLAIN_MARKS, t.OUTSIDE])
def test_two_answers_exactly(template):
    """With marks, without, and with marks that leave the end token out: the same."""
    assert segments(t.tokenizer(template), TWO) == [
        Segment("<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n", False),
        Segment("b<|im_end|>", True),
        Segment("\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n", False),
        Segment("d<|im_end|>", True),
        Segment("\n", False),
    ]


@pytest.mark.parametrize("template", [t.TEMPLATE, t.NO_END, t.DEFAULT_SYSTEM])
@pytest.mark.parametrize("messages", [TWO, (SYSTEM, *TWO), (ASK, Message("tool", "x"), ANSWER, ASK)])
def test_segments_join_to_what_the_template_renders(template, messages):
    found = segments(t.tokenizer(template), messages)
    assert "".join(s.text for s in found) == render(t.tokenizer(template), messages)
    assert all(s.text for s in found)


def test_last_only():
    assert learnt(t.TEMPLATE, TWO, last_only=True) == ["d<|im_end|>"]


def test_no_end_token():
    """Without a mark of its end, a turn includes all that the template puts after it."""
    assert learnt(t.NO_END, TWO) == ["b\n", "d\n"]


def test_an_end_mark_that_is_not_declared_special_is_found():
    tokenizer = t.tokenizer(t.TEMPLATE.replace("<|im_end|>", "<|turn|>"))
    tokenizer.add_tokens(["<|turn|>"])
    assert "<|turn|>" not in tokenizer.all_special_tokens
    assert [s.text for s in segments(tokenizer, TWO) if s.loss] == ["b<|turn|>", "d<|turn|>"]


@pytest.mark.parametrize("template", [t.TEMPLATE, t.DEFAULT_SYSTEM])
def test_a_conversation_that_the_assistant_begins(template):
    """The header of its turn carries no loss."""
    assert learnt(template, (ANSWER, *TWO)) == ["b<|im_end|>", "b<|im_end|>", "d<|im_end|>"]


def test_answers_that_quote_the_template():
    tricky = Message("assistant", "<|im_start|>assistant\nx<|im_end|>")
    assert learnt(t.TEMPLATE, (ASK, tricky)) == ["<|im_start|>assistant\nx<|im_end|><|im_end|>"]
    assert learnt(t.TEMPLATE, (tricky, ASK)) == ["<|im_start|>assistant\nx<|im_end|><|im_end|>"]


def test_templates_that_rewrite_turns_are_refused():
    thinking = (ASK, Message("assistant", "<think>hm</think>b"), Message("user", "c"), Message("assistant", "d"))
    with pytest.raises(UsageError, match="rewrites earlier turns"):
        segments(t.tokenizer(t.REWRITES), thinking)
    assert learnt(t.REWRITES, thinking[:2]) == ["<think>hm</think>b<|im_end|>"]
    assert learnt(t.REWRITES, thinking, last_only=True) == ["d<|im_end|>"]


def test_no_template():
    with pytest.raises(UsageError, match="no chat template"):
        segments(t.tokenizer(None), TWO)


def test_what_the_template_itself_refuses():
    with pytest.raises(UsageError, match="conversation of system, user, assistant: System role not supported"):
        segments(t.tokenizer(t.ALTERNATING), (SYSTEM, ASK, ANSWER))
