"""An answer of another prompt beside each answer: what a baseline over unrelated answers is measured on."""

from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np

from metier.core.data.encode import Item
from metier.core.errors import UsageError

AHEAD = 64
"""How many following items are looked at for one with another prompt."""


def mismatched(items: Iterable[Item], max_length: int) -> Iterator[Item]:
    """Each item with one more answer, that of the next item whose prompt is another; the last ones take the first.

    The other answer is cut to ``max_length`` with the prompt. Raises ``UsageError`` when no item has another prompt.
    """
    waiting: list[Item] = []
    first: list[Item] = []
    for item in items:
        if len(first) < AHEAD:
            first.append(item)
        waiting.append(item)
        while len(waiting) > 1 and (other := _other(waiting[0], waiting[1:])) is not None:
            yield _with(waiting.pop(0), other, max_length)
        if len(waiting) > AHEAD:
            yield _with(waiting[0], _needed(waiting.pop(0), first), max_length)
    for item in waiting:
        yield _with(item, _needed(item, first), max_length)


def _other(item: Item, found: list[Item]) -> Item | None:
    return next((x for x in found if not np.array_equal(x.prompt, item.prompt)), None)


def _needed(item: Item, found: list[Item]) -> Item:
    other = _other(item, found)
    if other is None:
        raise UsageError("all prompts are equal, so there is no answer of another prompt", where=item.id)
    return other


def _with(item: Item, other: Item, max_length: int) -> Item:
    room = max(0, max_length - len(item.prompt))
    ids, loss = other.answers[0][:room], other.answer_loss[0][:room]
    return replace(item, answers=(*item.answers, ids), answer_loss=(*item.answer_loss, loss))
