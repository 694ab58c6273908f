"""Chat templates: what is rendered, and which part of it the model should learn to write.

A conversation is rendered turn by turn, and each assistant turn is what its rendering adds to the prompt that would
have been shown for it. Works with any template whose rendering of a beginning is a beginning of the rendering; others
are refused, because their masks could not be trusted.
"""

from typing import Any, NamedTuple

from jinja2 import TemplateError

from metier.core.data.formats import Message
from metier.core.errors import UsageError


class Segment(NamedTuple):
    """A stretch of rendered text; ``loss`` says whether the model learns to write it."""

    text: str
    loss: bool


def render(tokenizer: Any, messages: tuple[Message, ...], *, generation: bool = False) -> str:
    """The template's text of a conversation; ``generation`` adds the opening of an assistant turn.

    Raises ``UsageError`` when the template itself refuses it (an unknown role, turns that do not alternate).
    """
    plain = [{"role": m.role, "content": m.content} for m in messages]
    try:
        return tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=generation)
    except TemplateError as e:
        roles = ", ".join(m.role for m in messages)
        raise UsageError(f"the chat template refuses a conversation of {roles}: {e}") from None


def segments(tokenizer: Any, messages: tuple[Message, ...], *, last_only: bool = False) -> list[Segment]:
    """A conversation as segments; assistant turns (or only the last) carry loss, their end-of-turn token included.

    Raises ``UsageError`` for a tokenizer without template or with one that cannot be masked turn by turn.
    """
    if not tokenizer.chat_template:
        raise UsageError(
            "the data are conversations, but the model's tokenizer has no chat template",
            hint="Use an instruction-tuned model, or data with prompt and completion columns.",
        )
    whole = render(tokenizer, messages)
    turns = [i for i, m in enumerate(messages) if m.role == "assistant"]
    found: list[Segment] = []
    done = 0
    for i in turns[-1:] if last_only else turns:
        after = render(tokenizer, messages[: i + 1])
        before = render(tokenizer, messages[:i], generation=True) if i else _opening(tokenizer, after)
        if not (whole.startswith(after) and after.startswith(before) and len(before) >= done):
            raise UsageError(
                "the chat template rewrites earlier turns, so the answers cannot be told from the prompts",
                hint="Templates that drop reasoning of earlier turns do this; train on conversations with one answer.",
            )
        end = len(before) + len(_turn(tokenizer, after[len(before) :]))
        found += [Segment(whole[done : len(before)], False), Segment(whole[len(before) : end], True)]
        done = end
    found.append(Segment(whole[done:], False))
    return [s for s in found if s.text]


def _opening(tokenizer: Any, text: str) -> str:
    """What stands before the answer in a conversation that the assistant begins: up to the opening of its turn."""
    asked = (Message("user", "?"),)
    closed, opened = (render(tokenizer, asked, generation=g) for g in (False, True))
    opening = opened.removeprefix(closed)
    return text[: text.index(opening) + len(opening)] if opening in text else ""


def _turn(tokenizer: Any, text: str) -> str:
    """What the model itself writes of a turn: up to its end-of-turn token, without what the template puts after it."""
    stripped = text.rstrip()
    marks = {*tokenizer.all_special_tokens, *(str(t) for t in tokenizer.added_tokens_decoder.values())}
    return stripped if any(stripped.endswith(m) for m in marks if m) else text
