"""What sources that let the model answer share: which prompts it is the turn of, and which answers are usable."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from metier.core.policy import Policy
from metier.core.sample import Answer


def everything(inputs: Mapping[str, Sequence[Any]]) -> list[Any]:
    """All examples of all inputs, one input after the other."""
    return [e for rows in inputs.values() for e in rows]


def in_turn(found: Sequence[Any], size: int | None, round: int) -> list[Any]:
    """The ``size`` examples whose turn it is in ``round``; from the beginning again after the last. All without a size."""
    number = min(size or len(found), len(found))
    return [found[(round * number + i) % len(found)] for i in range(number)]


def once(found: Sequence[Any], size: int | None, round: int) -> list[Any]:
    """The same without beginning again: each example has one turn, and after the last there is none."""
    number = size or max(1, len(found))
    return list(found[round * number : (round + 1) * number])


def seed(rng: np.random.Generator) -> int:
    """A seed for sampling."""
    return int(rng.integers(2**31))


def texts(answers: Iterable[Answer], finished: bool = True) -> list[str]:
    """What was written: answers of blanks are left out, and with ``finished`` those that did not end by themselves.

    Trained on, an unfinished answer would teach to stop in the middle, since its end token was never drawn.
    """
    return [a.text for a in answers if a.text.strip() and (a.ended or not finished)]


def drawn(
    policy: Policy, examples: Sequence[Any], number: int, rng: np.random.Generator, *, max_new_tokens: int,
    temperature: float = 1.0, top_p: float = 1.0, finished: bool = True,
) -> list[list[str]]:  # fmt: skip
    """Usable answers of the model to the prompt of each example, at most ``number`` each."""
    answers = policy.sample(
        [e.prompt for e in examples], number, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed(rng)
    )
    return [texts(own, finished) for own in answers]
